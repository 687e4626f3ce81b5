//! How far a request has come.

/// First TTLs that systems in use send with (Linux, macOS, BSD: 64; Windows: 128; network gear: 255).
const INITIAL_TTLS: [u8; 3] = [64, 128, 255];

/// Network hops between the caller and the guard, as the instance would count them: 1 from the
/// guard's own network namespace, 2 from another one (a bridged or CNI container), and one more for
/// each router that took one off the connection's TTL. Nothing lies between the guard and its own
/// namespace: what a client there has set its TTL to does not count.
///
/// `syn_ttl` is the TTL (IPv6: hop limit) with which the connection's SYN arrived.
#[must_use]
pub fn hops(same_netns: bool, syn_ttl: Option<u8>) -> u8 {
    if same_netns {
        return 1;
    }
    let lost = syn_ttl.map_or(0, |ttl| {
        let initial = INITIAL_TTLS
            .into_iter()
            .find(|initial| *initial >= ttl)
            .unwrap_or(u8::MAX);
        initial - ttl
    });
    lost.saturating_add(2)
}

/// The TTL with which the answer to a token request leaves for a caller, so that it gets as far as a
/// hop limit allows and no further: in another network namespace one hop lies behind it already. A
/// caller that has hidden how far away it is, by a TTL of its own, does not get it.
#[must_use]
pub fn reply_ttl(same_netns: bool, hop_limit: u8) -> u8 {
    let behind = u8::from(!same_netns);
    hop_limit.saturating_sub(behind).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_gets_as_far_as_the_limit_allows() {
        for (same_netns, limit, ttl) in [(true, 1, 1), (true, 64, 64), (false, 2, 1), (false, 3, 2)]
        {
            assert_eq!(reply_ttl(same_netns, limit), ttl, "{same_netns} {limit}");
        }
    }

    #[test]
    fn hops_are_counted_as_the_instance_does() {
        let table = [
            (true, None, 1),
            (true, Some(64), 1),
            (false, None, 2),
            (false, Some(64), 2),
            (false, Some(63), 3),
            (false, Some(127), 3),
            (true, Some(255), 1),
            (true, Some(5), 1),
            (false, Some(0), 66),
            (false, Some(129), 128),
        ];
        for (same_netns, ttl, expected) in table {
            assert_eq!(hops(same_netns, ttl), expected, "{same_netns} {ttl:?}");
        }
    }
}
