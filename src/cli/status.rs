//! `portcullis status`: how a running proxy fares, asked at its admin address.
//!
//! In: `/state` of a proxy. Out: its [`sections`], in words or as they are. A room that has something to tell there adds a
//! section and nothing else.

mod sections;

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value};
use tokio::net::TcpStream;

use super::explain::Output;
use super::{Failure, Outcome, Streams};
use sections::SECTIONS;

/// How long the whole answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// More than a proxy with a thousand open connections and as many listeners has to say.
const MOST_BYTES: usize = 32 << 20;

/// Arguments of `status`. Exit code 0 if the proxy is ready, 1 if it is not or cannot be asked.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit codes:\n  0  it is ready\n  1  it is not, or it cannot be asked\n  2  the command was not \
                        understood"
)]
pub struct StatusArgs {
    /// The proxy's admin address, as `admin.listen` has it.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9902")]
    pub admin: SocketAddr,
    /// For whom the answer is.
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Asks a proxy and tells what it says.
///
/// # Errors
/// The proxy cannot be asked, or nothing can be written.
pub fn status(args: &StatusArgs, streams: &mut Streams<'_>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let state = runtime.block_on(state_of(args.admin)).map_err(Failure::new)?;
    match args.output {
        Output::Text => {
            for line in in_words(&state) {
                writeln!(streams.out, "{line}")?;
            }
        }
        Output::Json => writeln!(streams.out, "{:#}", in_json(state.clone()))?,
    }
    Ok(if is_ready(&state) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_ready(state: &Value) -> bool {
    state["ready"] == true
}

/// A heading for each section that has something to say, and its lines below.
fn in_words(state: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    for section in SECTIONS {
        let said = (section.in_words)(state);
        if !said.is_empty() {
            lines.push(section.title.to_owned());
            // Names are the config's and may hold anything; a line stays one.
            lines.extend(said.iter().map(|line| format!("  {}", line.replace(char::is_control, " "))));
        }
    }
    lines
}

/// The parts of the state that sections speak of.
fn in_json(mut state: Value) -> Value {
    let keys = SECTIONS.iter().flat_map(|section| section.keys).copied();
    let said = keys.filter_map(|key| Some((key.to_owned(), state.get_mut(key)?.take())));
    Value::Object(said.collect::<Map<_, _>>())
}

/// What `/state` at this address says.
async fn state_of(admin: SocketAddr) -> Result<Value, String> {
    let answer = tokio::time::timeout(PATIENCE, get_state(admin)).await;
    let remedy = "is `portcullis run` running there, with this `admin.listen`? Name another address by --admin";
    let body = answer
        .unwrap_or_else(|_| Err(format!("no answer within {} seconds", PATIENCE.as_secs())))
        .map_err(|why| format!("cannot ask the proxy at {admin}: {why}; {remedy}"))?;
    let state: Value = serde_json::from_slice(&body)
        .map_err(|_| format!("what answers at {admin} is no portcullis; name its admin address by --admin"))?;
    match state.get("ready") {
        Some(Value::Bool(_)) => Ok(state),
        _ => Err(format!("what answers at {admin} is no portcullis; name its admin address by --admin")),
    }
}

async fn get_state(admin: SocketAddr) -> Result<Bytes, String> {
    let stream = TcpStream::connect(admin).await.map_err(|error| error.to_string())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let asking = async {
        let request = hyper::Request::get("/state").header("host", admin.to_string());
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| error.to_string())?;
        let answer = sender.send_request(request).await.map_err(|error| error.to_string())?;
        if answer.status() != hyper::StatusCode::OK {
            return Err(format!("it answers {}", answer.status()));
        }
        let body = Limited::new(answer.into_body(), MOST_BYTES).collect().await;
        body.map(|body| body.to_bytes()).map_err(|error| error.to_string())
    };
    tokio::select! {
        biased;
        answered = asking => answered,
        _ = connection => Err("it closed the connection".into()),
    }
}

#[cfg(test)]
mod tests;
