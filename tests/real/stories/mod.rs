//! The stories, by what they are about.

pub mod entries;
pub mod federation;
pub mod outage;
pub mod rotation;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TEXT: &[u8] = b"carried between identities that SPIRE issued";

/// Sends and expects the same back, soon.
pub async fn echo_once(stream: &mut TcpStream) -> io::Result<()> {
    let answered = tokio::time::timeout(Duration::from_secs(10), async {
        stream.write_all(TEXT).await?;
        let mut back = vec![0; TEXT.len()];
        stream.read_exact(&mut back).await?;
        if back == TEXT { Ok(()) } else { Err(io::Error::other("something else came back")) }
    });
    answered.await.unwrap_or_else(|_| Err(io::Error::other("no echo within 10 s")))
}

/// A whole connection: opened, used, finished in order.
pub async fn whole(way_in: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(way_in).await?;
    echo_once(&mut stream).await?;
    stream.shutdown().await?;
    let mut rest = [0; 1];
    let end = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut rest)).await;
    match end {
        Ok(Ok(0)) => Ok(()),
        Ok(Ok(_)) => Err(io::Error::other("more bytes than were sent")),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("no end within 10 s")),
    }
}

/// Waits until the other side ends a connection.
pub async fn ended(stream: &mut TcpStream, limit: Duration) {
    let mut rest = [0; 64];
    let end = async { while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {} };
    assert!(tokio::time::timeout(limit, end).await.is_ok(), "the connection is still open after {limit:?}");
}
