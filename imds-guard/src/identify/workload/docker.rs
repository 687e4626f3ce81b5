//! docker's word on its containers, by its Engine API
//! (<https://docs.docker.com/reference/api/engine/>, `ContainerInspect`).

use std::{io::ErrorKind, path::Path};

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;

use crate::policy::caller::Container;

/// Largest answer that is read.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    name: Option<String>,
    config: Option<Config>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    image: Option<String>,
}

/// What docker says of a container; `None` if it knows none of that id, or there is no docker.
///
/// # Errors
/// It does not answer as it should.
pub async fn inspect(socket: &Path, id: &str) -> anyhow::Result<Option<Container>> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(socket.display().to_string()),
    };
    let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::get(format!("/containers/{id}/json"))
        .header(HOST, "docker")
        .body(Empty::<Bytes>::new())?;
    let answer = client.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    connection.abort();
    match status {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Ok(None),
        _ => bail!("it answers {status}"),
    }
    let Ok(body) = body else {
        bail!("its answer is cut off or too large");
    };
    let inspected: Inspected = serde_json::from_slice(&body.to_bytes())?;
    let name = inspected
        .name
        .map(|name| name.trim_start_matches('/').to_owned());
    Ok(Some(Container {
        name,
        image: inspected.config.and_then(|config| config.image),
    }))
}
