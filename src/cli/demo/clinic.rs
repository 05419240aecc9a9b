//! The clinic: a service that speaks HTTP/1.1 and gRPC on one port, and the gRPC call of who asks it. Neither end knows
//! anything of TLS or of rules, and gRPC is spoken here as its specification has it, without a library.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http2::handshake;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// The gRPC service; the demo's rules name it.
pub(super) const SERVICE: &str = "clinic.v1.Appointments";
/// Where a call's own status stands, in trailers or in place of them.
const GRPC_STATUS: &str = "grpc-status";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// Connections that the service takes at once.
const MOST_CONNECTIONS: usize = 64;
/// How long a call may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// The one message of the gRPC service, there and back.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Note {
    #[prost(string, tag = "1")]
    text: String,
}

impl Note {
    /// Framed as gRPC does: not compressed, length, message.
    fn framed(text: impl Into<String>) -> Bytes {
        let message = Self { text: text.into() }.encode_to_vec();
        let length = u32::try_from(message.len()).unwrap_or(0).to_be_bytes();
        [&[0], length.as_slice(), &message].concat().into()
    }

    /// The text of the one message of a body; none if it is not that.
    fn text_of(body: &[u8]) -> Option<String> {
        let (head, message) = body.split_first_chunk::<5>()?;
        let [0, length @ ..] = *head else { return None };
        let whole = usize::try_from(u32::from_be_bytes(length)).is_ok_and(|length| length == message.len());
        whole.then(|| Self::decode(message).ok()).flatten().map(|note| note.text)
    }
}

/// How often each path was asked for.
type Asked = Arc<Mutex<BTreeMap<String, u64>>>;

/// The service. Ends when dropped.
#[derive(Debug)]
pub(super) struct Clinic {
    /// Where it listens.
    pub(super) address: SocketAddr,
    asked: Asked,
    _tasks: JoinSet<()>,
}

impl Clinic {
    pub(super) async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        Ok(Self::on(address, [listener]))
    }

    /// Serves on these, of which the first is at `address`.
    pub(super) fn on(address: SocketAddr, listeners: impl IntoIterator<Item = TcpListener>) -> Self {
        let asked = Asked::default();
        let mut tasks = JoinSet::new();
        for listener in listeners {
            tasks.spawn(serve(listener, Arc::clone(&asked)));
        }
        Self { address, asked, _tasks: tasks }
    }

    /// The paths that were asked for so far, and how often.
    pub(super) fn asked(&self) -> BTreeMap<String, u64> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(listener: TcpListener, asked: Asked) {
    let places = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let asked = Arc::clone(&asked);
        connections.spawn(async move {
            let mut first = [0; 3];
            let preface = stream.peek(&mut first).await.is_ok() && &first == b"PRI";
            let at = stream.local_addr().ok();
            let service = service_fn(move |request| answer(request, at, Arc::clone(&asked)));
            let io = TokioIo::new(stream);
            // A caller that goes away is no matter of the service.
            let _ = match preface {
                true => http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await,
                false => http1::Builder::new().serve_connection(io, service).await,
            };
            drop(place);
        });
    }
}

/// Tells the caller what arrived here: the path, at which address, who asks as the sidecar says it, and the trace.
async fn answer(
    request: Request<Incoming>,
    at: Option<SocketAddr>,
    asked: Asked,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, hyper::Error> {
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let path = request.uri().path().to_owned();
    let caller = header("x-forwarded-client-cert").split(';').find_map(|part| part.strip_prefix("URI="));
    let told = serde_json::json!({ "path": path, "at": at, "caller": caller, "traceparent": header("traceparent") })
        .to_string();
    *asked.lock().unwrap_or_else(PoisonError::into_inner).entry(path).or_default() += 1;
    let grpc = request.headers().get(CONTENT_TYPE) == Some(&GRPC);
    if !grpc {
        return Ok(Response::new(Full::new(Bytes::from(told + "\n")).boxed_unsync()));
    }
    let well = Note::text_of(&request.into_body().collect().await?.to_bytes()).is_some();
    // OK, or INVALID_ARGUMENT.
    let mut trailers = HeaderMap::new();
    trailers.insert(GRPC_STATUS, HeaderValue::from(if well { 0_u16 } else { 3 }));
    let body = Full::new(Note::framed(told)).with_trailers(std::future::ready(Some(Ok(trailers))));
    let mut response = Response::new(body.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    Ok(response)
}

/// What came of a gRPC call: its status, and the message if there was one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Called {
    pub(super) status: Option<u16>,
    pub(super) text: String,
}

/// Calls a method of the service through a sidecar: plaintext HTTP/2, as a workload does it.
pub(super) async fn call(address: SocketAddr, method: &str, traceparent: &str) -> io::Result<Called> {
    let calling = async {
        let stream = TokioIo::new(TcpStream::connect(address).await?);
        let (mut sender, connection) = handshake(TokioExecutor::new(), stream).await.map_err(io::Error::other)?;
        let connection = tokio::spawn(async move { drop(connection.await) });
        let request = Request::post(format!("http://clinic/{SERVICE}/{method}"))
            .header(CONTENT_TYPE, GRPC)
            .header("te", "trailers")
            .header("traceparent", traceparent)
            .body(Full::new(Note::framed("Tuesday")))
            .map_err(io::Error::other)?;
        let response = sender.send_request(request).await.map_err(io::Error::other)?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?;
        let status = |fields: &HeaderMap| fields.get(GRPC_STATUS)?.to_str().ok()?.parse().ok();
        let status = body.trailers().and_then(status).or_else(|| status(&head.headers));
        let text = Note::text_of(&body.to_bytes()).unwrap_or_default();
        connection.abort();
        Ok(Called { status, text })
    };
    tokio::time::timeout(PATIENCE, calling).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_framed_by_five_bytes() {
        assert_eq!(&*Note::framed("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(Note::text_of(&Note::framed("ab")).as_deref(), Some("ab"));
        for broken in [&[][..], &[0, 0, 0, 0], &[1, 0, 0, 0, 0], &[0, 0, 0, 0, 1], &[0, 0, 0, 0, 0, 0]] {
            assert_eq!(Note::text_of(broken), None, "{broken:?}");
        }
    }

    #[tokio::test]
    async fn one_port_answers_both_protocols() {
        let clinic = Clinic::start().await.unwrap();
        let called = call(clinic.address, "Book", "00-1-2-01").await.unwrap();
        assert_eq!(called.status, Some(0));
        let told: serde_json::Value = serde_json::from_str(&called.text).unwrap();
        assert_eq!((&told["path"], &told["traceparent"]), (&format!("/{SERVICE}/Book").into(), &"00-1-2-01".into()));
        let mut caller = super::super::workloads::Caller::connect(clinic.address).await.unwrap();
        let answer = caller.ask("/patients/1").await.unwrap();
        assert_eq!(answer, r#"{"caller":null,"path":"/patients/1","traceparent":""}"#);
        let asked = clinic.asked();
        assert_eq!(asked.into_values().collect::<Vec<_>>(), [1, 1]);
    }
}
