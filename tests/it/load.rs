//! Clients that keep asking in every way while something happens to the sidecars, and hold that nothing failed.
//!
//! They are strict: what a client of HTTP may do by itself is to open another connection when it is told that this one
//! ends, and nothing else.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::{BodyExt, Either, Empty, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::HeaderValue;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;

use crate::harness::soon;

/// Between two requests of one client.
const PACE: Duration = Duration::from_millis(20);
/// Pieces of a stream, and the time between them.
const PIECES: usize = 30;
const PIECE_EVERY: Duration = Duration::from_millis(50);

pub type Piece = Result<Frame<Bytes>, std::convert::Infallible>;
pub type Outgoing = Either<Either<Empty<Bytes>, Full<Bytes>>, StreamBody<ReceiverStream<Piece>>>;

pub fn nothing() -> Outgoing {
    Either::Left(Either::Left(Empty::new()))
}

pub fn text(text: String) -> Outgoing {
    Either::Left(Either::Right(Full::new(text.into())))
}

/// A body that is written to as the test goes on.
pub fn streamed() -> (mpsc::Sender<Piece>, Outgoing) {
    let (sender, receiver) = mpsc::channel(4);
    (sender, Either::Right(StreamBody::new(ReceiverStream::new(receiver))))
}

/// A request for this URI, or for this path of whoever is at the other end.
pub fn request(method: &str, uri: impl std::fmt::Display, body: Outgoing) -> Request<Outgoing> {
    let mut request = Request::builder().method(method).uri(uri.to_string()).body(body).unwrap();
    if request.uri().authority().is_none() {
        request.headers_mut().insert("host", HeaderValue::from_static("a.example"));
    }
    request
}

/// How often each of these happened.
#[derive(Debug, Default)]
pub struct Tally {
    pub requests: AtomicU64,
    pub connections: AtomicU64,
    pub streams: AtomicU64,
}

fn one_more(count: &AtomicU64) -> u64 {
    count.fetch_add(1, Ordering::Relaxed)
}

/// Clients at work.
pub struct Load {
    pub tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    clients: JoinSet<Result<(), String>>,
}

impl Load {
    /// Starts them against an outbound listener with the server of tests/go/cmd/http-peer behind.
    pub fn start(address: SocketAddr) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut load = Self { tally: Arc::default(), stop, clients: JoinSet::new() };
        let client = Client { address, stop: stopped, tally: Arc::clone(&load.tally) };
        for _ in 0..4 {
            load.clients.spawn(client.clone().keeps_its_connection());
        }
        for _ in 0..2 {
            load.clients.spawn(client.clone().connects_each_time());
            load.clients.spawn(client.clone().multiplexes());
            load.clients.spawn(client.clone().streams());
        }
        load
    }

    /// Goes on until so many requests more have been served. Panics if one fails.
    pub async fn goes_on_for(&mut self, requests: u64) {
        let until = self.tally.requests.load(Ordering::Relaxed) + requests;
        let served = async {
            while self.tally.requests.load(Ordering::Relaxed) < until {
                if let Ok(Some(ended)) = tokio::time::timeout(PACE, self.clients.join_next()).await {
                    return Some(ended);
                }
            }
            None
        };
        let failed = soon("requests to be served", served).await;
        if let Some(failed) = failed {
            panic!("{failed:?}");
        }
    }

    /// Ends, and holds that everything that was begun went well.
    pub async fn all_went_well(mut self) -> Arc<Tally> {
        self.stop.send_replace(true);
        let mut failures = Vec::new();
        while let Some(ended) = soon("the end of the load", self.clients.join_next()).await {
            failures.extend(ended.unwrap().err());
        }
        assert_eq!(failures, Vec::<String>::new());
        self.tally
    }
}

#[derive(Clone)]
struct Client {
    address: SocketAddr,
    stop: watch::Receiver<bool>,
    tally: Arc<Tally>,
}

/// The response must be 200, and whole.
async fn whole(what: &str, response: Response<Incoming>) -> Result<Bytes, String> {
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.into_body().collect().await.map_err(|error| format!("{what}: body: {error:?}"))?.to_bytes();
    if status == 200 { Ok(body) } else { Err(format!("{what}: {status} {headers:?} {body:?}")) }
}

impl Client {
    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    async fn connect(&self) -> Result<TokioIo<TcpStream>, String> {
        one_more(&self.tally.connections);
        let stream = TcpStream::connect(self.address).await.map_err(|error| format!("connect: {error}"))?;
        stream.set_nodelay(true).unwrap();
        Ok(TokioIo::new(stream))
    }

    /// HTTP/1.1, GET and POST in turn.
    async fn keeps_its_connection(self) -> Result<(), String> {
        while !self.stopped() {
            let (mut sender, driver) = http1::handshake(self.connect().await?).await.map_err(|e| e.to_string())?;
            tokio::spawn(driver);
            // Ends with the connection: `connection: close` was said, or the other side has closed.
            while !self.stopped() && sender.ready().await.is_ok() {
                let number = one_more(&self.tally.requests);
                let what = format!("request {number} on a connection that is kept");
                let request = if number.is_multiple_of(2) {
                    request("GET", format!("/echo/{number}"), nothing())
                } else {
                    request("POST", format!("/echo/{number}"), text(format!("body {number}")))
                };
                let response = soon(&what, sender.send_request(request)).await;
                let response = response.map_err(|error| format!("{what}: {error:?}"))?;
                whole(&what, response).await?;
                tokio::time::sleep(PACE).await;
            }
        }
        Ok(())
    }

    async fn connects_each_time(self) -> Result<(), String> {
        while !self.stopped() {
            let what = format!("request {} on a new connection", one_more(&self.tally.requests));
            let (mut sender, driver) = http1::handshake(self.connect().await?).await.map_err(|e| e.to_string())?;
            tokio::spawn(driver);
            let mut request = request("POST", "/echo/new", text("new".to_owned()));
            request.headers_mut().insert("connection", HeaderValue::from_static("close"));
            let response = soon(&what, sender.send_request(request)).await;
            whole(&what, response.map_err(|error| format!("{what}: {error:?}"))?).await?;
            tokio::time::sleep(PACE).await;
        }
        Ok(())
    }

    async fn http2(&self) -> Result<http2::SendRequest<Outgoing>, String> {
        let handshake = http2::handshake(TokioExecutor::new(), self.connect().await?);
        let (sender, driver) = handshake.await.map_err(|error| error.to_string())?;
        tokio::spawn(driver);
        Ok(sender)
    }

    fn uri(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// HTTP/2, some requests at a time.
    async fn multiplexes(self) -> Result<(), String> {
        while !self.stopped() {
            let sender = self.http2().await?;
            while !self.stopped() && !sender.is_closed() {
                let mut batch = JoinSet::new();
                for _ in 0..6 {
                    let what = format!("request {} over HTTP/2", one_more(&self.tally.requests));
                    let request = request("POST", self.uri("/delay/5"), text(what.clone()));
                    let mut sender = sender.clone();
                    batch.spawn(async move {
                        match soon(&what, sender.try_send_request(request)).await {
                            Ok(response) => whole(&what, response).await.map(|_| ()),
                            // It was not sent: GOAWAY had come before.
                            Err(mut error) => match error.take_message() {
                                Some(_) => Ok(()),
                                None => Err(format!("{what}: {:?}", error.into_error())),
                            },
                        }
                    });
                }
                while let Some(ended) = batch.join_next().await {
                    ended.unwrap()?;
                }
                tokio::time::sleep(PACE).await;
            }
        }
        Ok(())
    }

    /// Both directions at once for a while, as a stream of gRPC does.
    async fn streams(self) -> Result<(), String> {
        while !self.stopped() {
            let mut sender = self.http2().await?;
            while !self.stopped() && !sender.is_closed() {
                let what = format!("stream {}", one_more(&self.tally.streams));
                let (pieces, body) = streamed();
                let sent = soon(&what, sender.try_send_request(request("POST", self.uri("/duplex"), body))).await;
                let response = match sent {
                    Ok(response) => response,
                    Err(mut error) => match error.take_message() {
                        Some(_) => break,
                        None => return Err(format!("{what}: {:?}", error.into_error())),
                    },
                };
                let mut body = response.into_body();
                for piece in 0..PIECES {
                    let said = format!("piece {piece};");
                    let gone = pieces.send(Ok(Frame::data(said.clone().into()))).await.is_err();
                    let mut heard = Vec::new();
                    while heard.len() < said.len() {
                        let frame = soon(&what, body.frame()).await;
                        let Some(Ok(frame)) = frame else {
                            return Err(format!("{what}, piece {piece}, {gone}: {frame:?}"));
                        };
                        heard.extend_from_slice(&frame.into_data().unwrap_or_default());
                    }
                    if heard != said.as_bytes() {
                        return Err(format!("{what}, piece {piece}: {}", String::from_utf8_lossy(&heard)));
                    }
                    tokio::time::sleep(PIECE_EVERY).await;
                }
                drop(pieces);
                let rest = soon(&what, body.collect()).await.map_err(|error| format!("{what}: its end: {error:?}"))?;
                if !rest.to_bytes().is_empty() {
                    return Err(format!("{what}: more than was sent"));
                }
            }
        }
        Ok(())
    }
}
