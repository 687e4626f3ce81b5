//! The screen.

use ratatui::{
    Frame,
    layout::{Constraint, Layout},
    style::{Color, Modifier, Style},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Paragraph, Row, Table},
};

use super::seen::{Order, Seen};
use crate::{control::Status, forensics::render::plain, policy::Mode};

/// Lines for refusals, with their head.
const REFUSALS: u16 = 8;
const QUIET: Style = Style::new().fg(Color::DarkGray);
const V1: Style = Style::new().fg(Color::Yellow);
const DENIED: Style = Style::new().fg(Color::Red);

/// Draws everything.
pub fn draw(frame: &mut Frame<'_>, seen: &Seen, status: &Status, is_paused: bool) {
    let [head, callers, refusals, foot] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Min(4),
        Constraint::Length(REFUSALS),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(self::head(status), head);
    frame.render_widget(self::callers(seen), callers);
    frame.render_widget(self::refusals(seen), refusals);
    let state = if is_paused { "paused  " } else { "" };
    let missed = match seen.missed {
        0 => String::new(),
        missed => format!("{missed} missed here  "),
    };
    let keys = Line::from(vec![
        Span::styled(state, V1),
        Span::styled(missed, DENIED),
        Span::styled("sort: v1 rate denied name   pause   quit", QUIET),
    ]);
    frame.render_widget(keys, foot);
}

fn head(status: &Status) -> Paragraph<'static> {
    let totals = &status.totals;
    let mode = match status.mode {
        Mode::Enforce => Span::styled("enforce", Style::new().add_modifier(Modifier::BOLD)),
        Mode::Audit => Span::styled("audit", V1),
    };
    let lost = match status.events_lost {
        0 => Span::raw(""),
        lost => Span::styled(format!("  {lost} events lost"), DENIED),
    };
    let requests = totals.requests;
    Paragraph::new(vec![
        Line::from(vec![
            Span::raw(format!(
                "imds-guard {}  pid {}  ",
                status.version, status.pid
            )),
            mode,
            Span::raw(format!("  {} rules", status.rules.len())),
            lost,
        ]),
        Line::from(vec![
            Span::styled(format!("v1 {}", requests.v1), V1),
            Span::raw(format!("  v2 {}  tokens {}  ", requests.v2, requests.token)),
            Span::styled(format!("refused {}", totals.denied), DENIED),
            Span::raw(format!("  marked {}", totals.audited)),
            Span::raw(format!(
                "  packets dropped {}",
                totals.backstop_dropped + totals.perimeter_dropped
            )),
        ]),
    ])
}

fn callers(seen: &Seen) -> Table<'static> {
    let title = |name: &'static str, order: Order| match seen.order == order {
        true => Cell::from(format!("{name}▾")).style(Style::new().add_modifier(Modifier::BOLD)),
        false => Cell::from(name),
    };
    let head = Row::new([
        title("V1", Order::V1),
        Cell::from("V2"),
        Cell::from("TOKENS"),
        Cell::from("MARKED"),
        title("DENIED", Order::Denied),
        title("RATE/S", Order::Rate),
        title("CALLER", Order::Name),
    ])
    .style(QUIET);
    let rows = seen.rows().into_iter().map(|row| {
        let number = |number: u64, style: Style| {
            let style = if number == 0 { QUIET } else { style };
            Cell::from(format!("{number:>7}")).style(style)
        };
        Row::new([
            number(row.v1, V1),
            number(row.v2, Style::new()),
            number(row.token, Style::new()),
            number(row.marked, V1),
            number(row.denied, DENIED),
            Cell::from(format!("{:>7.1}", row.rate)),
            Cell::from(plain(&row.name)),
        ])
    });
    let widths = [
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Min(20),
    ];
    Table::new(rows, widths).header(head)
}

fn refusals(seen: &Seen) -> Paragraph<'static> {
    let lines: Vec<_> = seen.refusals().map(|it| Line::raw(plain(it))).collect();
    let block = Block::new()
        .borders(Borders::TOP)
        .title("refused")
        .style(QUIET);
    Paragraph::new(lines).block(block)
}
