//! The SPIFFE Workload API on a Unix socket.
//!
//! In: connections. Out: what [`super::streams`] pushes. The security header is enforced, the JWT calls are answered
//! with Unimplemented, and connections, streams and message sizes are bounded.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::body::{Body as HttpBody, Incoming};
use hyper::http;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::Authority;
use super::attest::Peer;
use super::config::Entry;
use super::streams::{Bundles, Desk, Svids};
use crate::identity::workload_api::pb::{
    FETCH_X509_BUNDLES, FETCH_X509_SVID, JWT_METHODS, SECURITY_HEADER, X509BundlesRequest, X509BundlesResponse,
    X509SvidRequest, X509SvidResponse,
};

/// The most connections that are open at once; further ones wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// The most streams on one connection.
const MAX_STREAMS_PER_CONNECTION: u32 = 32;
/// Requests have no fields; this leaves room for ones that later versions may add.
const MAX_REQUEST_BYTES: usize = 16 * 1024;
/// From the headers of a request to its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may stay open without a stream.
const IDLE: Duration = Duration::from_secs(60);
/// Pings find callers that are gone without a word, or stopped.
const PING: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(20));

/// A Workload API server on one Unix socket. The socket file is removed when it drops.
#[derive(Debug)]
pub struct WorkloadApiServer {
    listener: UnixListener,
    desk: Arc<Desk>,
    _socket: SocketFile,
}

/// Changes the entries of a running server.
#[derive(Clone, Debug)]
pub struct EntriesHandle(Arc<Desk>);

impl EntriesHandle {
    /// Replaces the entries; open streams are told at once.
    pub fn set(&self, entries: Vec<Entry>) {
        self.0.set_entries(entries);
    }
}

/// The file of a socket that we listen on.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Another server may have put its own in the place by now.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl WorkloadApiServer {
    /// Listens on a socket with the given mode. Its folder is made if it is missing; a socket file that nobody answers
    /// on any more is replaced. To be called from within a tokio runtime.
    ///
    /// # Errors
    /// Something else is at the path, another server answers on it, or the system refuses; the message says which.
    pub fn bind(authority: Authority, socket: &Path, mode: u32, entries: Vec<Entry>) -> io::Result<Self> {
        if let Some(folder) = socket.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|e| say(&e, format!("the folder {} cannot be made", folder.display())))?;
        }
        clear_stale(socket)?;
        let listener =
            UnixListener::bind(socket).map_err(|e| say(&e, format!("cannot listen on {}", socket.display())))?;
        let inode = std::fs::symlink_metadata(socket)?.ino();
        let file = SocketFile { path: socket.to_owned(), inode };
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(mode))?;
        Ok(Self { listener, desk: Arc::new(Desk::new(authority, entries)), _socket: file })
    }

    /// A handle to change the entries by while the server runs.
    pub fn entries(&self) -> EntriesHandle {
        EntriesHandle(Arc::clone(&self.desk))
    }

    /// Serves until `shutdown` is ready, then closes all connections. CA and SVIDs move on only while somebody calls
    /// [`Authority::maintain`]; [`super::serve`] does, and [`Authority::upkeep`] is there for others.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let mut connections = JoinSet::new();
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        tokio::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => return,
                // Finished ones are taken out, or they would pile up.
                Some(_) = connections.join_next() => continue,
                accepted = accept(&self.listener, &places) => accepted,
            };
            match accepted {
                Ok((stream, peer, place)) => {
                    let desk = Arc::clone(&self.desk);
                    connections.spawn(async move {
                        serve_connection(stream, peer, desk).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely: it passes.
                    tracing::warn!(%error, "the Workload API cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn accept(
    listener: &UnixListener,
    places: &Arc<Semaphore>,
) -> io::Result<(UnixStream, Peer, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // At once, while the process that connected is most likely still there.
    let peer = Peer::of(stream.peer_cred()?);
    Ok((stream, peer, place))
}

fn say(error: &io::Error, what: String) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Removes a socket that nobody answers on.
fn clear_stale(socket: &Path) -> io::Result<()> {
    let meta = match std::fs::symlink_metadata(socket) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let name = socket.display();
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{name} exists and is not a socket")));
    }
    match std::os::unix::net::UnixStream::connect(socket) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, format!("another server answers on {name}"))),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(socket),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(say(&e, format!("{name} exists, and whether it is in use cannot be found out"))),
    }
}

async fn serve_connection(stream: UnixStream, peer: Peer, desk: Arc<Desk>) {
    let open = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&open);
    let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
        let desk = Arc::clone(&desk);
        let stream = OpenStream::count(&counted);
        async move {
            let response = answer(desk, peer, request).await;
            Ok::<_, Infallible>(response.map(|body| Counted { body, _stream: stream }))
        }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1)
        .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
        .max_header_list_size(16 * 1024)
        .max_pending_accept_reset_streams(20)
        .max_send_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = idle(&open) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(REQUEST_TIMEOUT, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection to the Workload API broke");
    }
}

/// Ready when there has been no stream for [`IDLE`], give or take a part of it.
async fn idle(open: &AtomicUsize) {
    let mut quiet = 0;
    while quiet < 6 {
        tokio::time::sleep(IDLE / 6).await;
        quiet = if open.load(Ordering::Relaxed) == 0 { quiet + 1 } else { 0 };
    }
}

/// One stream, counted while it lives.
struct OpenStream(Arc<AtomicUsize>);

impl OpenStream {
    fn count(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A response's body, which is counted as an open stream.
struct Counted {
    body: Body,
    _stream: OpenStream,
}

impl HttpBody for Counted {
    type Data = hyper::body::Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

async fn answer(desk: Arc<Desk>, peer: Peer, request: http::Request<Incoming>) -> http::Response<Body> {
    let path = request.uri().path().to_owned();
    let secured = request.headers().get(SECURITY_HEADER).is_some_and(|value| value == "true");
    if !secured {
        // SPIRE's words, which clients and people know.
        return Status::invalid_argument("security header missing from request").into_http();
    }
    let answered = async {
        match path.as_str() {
            FETCH_X509_SVID => {
                let codec = ProstCodec::<X509SvidResponse, X509SvidRequest>::default();
                let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_REQUEST_BYTES);
                grpc.server_streaming(FetchX509Svid { desk, peer }, request).await
            }
            FETCH_X509_BUNDLES => {
                let codec = ProstCodec::<X509BundlesResponse, X509BundlesRequest>::default();
                let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_REQUEST_BYTES);
                grpc.server_streaming(FetchX509Bundles { desk, peer }, request).await
            }
            jwt if JWT_METHODS.contains(&jwt) => {
                Status::unimplemented("this authority issues no JWT-SVIDs").into_http()
            }
            _ => Status::unimplemented("unknown method").into_http(),
        }
    };
    match tokio::time::timeout(REQUEST_TIMEOUT, answered).await {
        Ok(response) => response,
        Err(_) => Status::deadline_exceeded("the request did not arrive in time").into_http(),
    }
}

struct FetchX509Svid {
    desk: Arc<Desk>,
    peer: Peer,
}

struct FetchX509Bundles {
    desk: Arc<Desk>,
    peer: Peer,
}

macro_rules! streaming {
    ($method:ty, $request:ty, $response:ty, $composer:ty) => {
        impl tower_service::Service<Request<$request>> for $method {
            type Response = Response<super::streams::Pushed<$response>>;
            type Error = Status;
            type Future = std::future::Ready<Result<Self::Response, Status>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, _: Request<$request>) -> Self::Future {
                std::future::ready(self.desk.open(self.peer, <$composer>::default()).map(Response::new))
            }
        }
    };
}
streaming!(FetchX509Svid, X509SvidRequest, X509SvidResponse, Svids);
streaming!(FetchX509Bundles, X509BundlesRequest, X509BundlesResponse, Bundles);

#[cfg(test)]
mod tests;
