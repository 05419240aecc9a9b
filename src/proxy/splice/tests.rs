use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::proxy::listener::Client;
use crate::proxy::registry::{Registration, Registry};
use crate::tls::record::Direction;

/// A connection: the end that a test holds, and the one that is forwarded.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, listener.accept().await.unwrap().0)
}

fn registered() -> Registration {
    let client = Client::Tcp(([127, 0, 0, 1], 1).into());
    Arc::new(Registry::default()).register(Direction::Outbound, "up".into(), client)
}

fn deadlines(idle: Duration, half_closed: Duration) -> Deadlines {
    Deadlines { idle, half_closed, max_age: None, peer_expiry: None }
}

const MINUTE: Duration = Duration::from_secs(60);

/// Forwards in a task of its own; answers how it ended, and how many bytes it told of, from the client and from the server.
fn forwarding(
    (client, ahead): (TcpStream, &[u8]),
    (server, answered): (TcpStream, &[u8]),
    deadlines: Deadlines,
) -> (Registration, tokio::task::JoinHandle<(End, u64, u64)>) {
    let registration = registered();
    let entry = Arc::clone(registration.entry());
    let (ahead, answered) = (ahead.to_vec(), answered.to_vec());
    let task = tokio::spawn(async move {
        let (mut sent, mut received) = (0, 0);
        let end = Splice::new(
            Side { socket: &client, ahead },
            Side { socket: &server, ahead: answered },
            entry.stopper(),
            deadlines,
            |out, back| (sent, received) = (sent + out, received + back),
        )
        .await;
        (end, sent, received)
    });
    (registration, task)
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| ((at * 31 + at / 251 + seed) % 256) as u8).collect()
}

async fn both_ways_whole() {
    let ((client, inner_client), (server, inner_server)) = (pair().await, pair().await);
    let (_registration, task) =
        forwarding((inner_client, b"ahead"), (inner_server, b"greeting"), deadlines(MINUTE, MINUTE));
    let (question, answer) = (pattern(5_000_000, 1), pattern(3_000_000, 2));
    let speak = |mut io: TcpStream, says: Vec<u8>, hears: Vec<u8>| async move {
        let (mut read, mut write) = io.split();
        let mut heard = Vec::new();
        let (written, read) = tokio::join!(
            async {
                for chunk in says.chunks(70_001) {
                    write.write_all(chunk).await?;
                }
                write.shutdown().await
            },
            read.read_to_end(&mut heard)
        );
        written.unwrap();
        read.unwrap();
        assert!(heard == hears, "{} bytes of {}", heard.len(), hears.len());
    };
    let sent = [b"ahead", &question[..]].concat();
    let received = [b"greeting", &answer[..]].concat();
    tokio::join!(speak(client, question, received.clone()), speak(server, answer, sent.clone()));
    let (end, out, back) = task.await.unwrap();
    assert_eq!((end.cause, out, back), (Cause::Done, sent.len() as u64, received.len() as u64));
}

#[tokio::test]
async fn every_byte_arrives_once_and_in_order_both_ways_and_the_ends_after_them() {
    both_ways_whole().await;
    assert!(PIPES.with_borrow(|pipes| !pipes.is_empty()), "it went through pipes");
}

#[tokio::test]
async fn without_pipes_it_is_copied() {
    WITHOUT_UNTIL.set(Some(Instant::now() + MINUTE));
    both_ways_whole().await;
    assert!(PIPES.with_borrow(Vec::is_empty), "no pipe was made");
}

/// By pipes, and without any.
fn each_way() -> [Option<Instant>; 2] {
    [None, Some(Instant::now() + MINUTE)]
}

fn urgent(stream: &TcpStream) {
    assert_eq!(socket2::SockRef::from(stream).send_out_of_band(b"!").unwrap(), 1);
}

#[tokio::test]
async fn what_follows_an_urgent_byte_arrives_while_the_connection_is_open() {
    for without in each_way() {
        PIPES.set(Vec::new());
        WITHOUT_UNTIL.set(without);
        let ((mut client, inner_client), (mut server, inner_server)) = (pair().await, pair().await);
        client.write_all(b"ab").await.unwrap();
        urgent(&client);
        client.write_all(b"cdef").await.unwrap();
        let patient = deadlines(Duration::from_secs(5), MINUTE);
        let (_registration, task) = forwarding((inner_client, b""), (inner_server, b""), patient);
        let mut heard = [0; 6];
        server.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"abcdef");
        // At the head of what is queued, and last of it.
        urgent(&client);
        client.write_all(b"gh").await.unwrap();
        server.read_exact(&mut heard[..2]).await.unwrap();
        assert_eq!(&heard[..2], b"gh");
        urgent(&client);
        let last = pattern(1_000_000, 4);
        let mut rest = vec![0; last.len()];
        let (written, read) = tokio::join!(client.write_all(&last), server.read_exact(&mut rest));
        written.unwrap();
        read.unwrap();
        assert!(rest == last);
        drop((client, server));
        let (end, sent, received) = task.await.unwrap();
        assert_eq!((end.cause, sent, received), (Cause::Done, 8 + last.len() as u64, 0));
        assert_eq!(PIPES.with_borrow(Vec::is_empty), without.is_some(), "what follows goes through pipes again");
    }
}

#[tokio::test]
async fn an_end_after_an_urgent_byte_is_passed_on_after_all_that_came_before_it() {
    for (without, last) in each_way().into_iter().flat_map(|way| [(way, &b"cdef"[..]), (way, b"")]) {
        PIPES.set(Vec::new());
        WITHOUT_UNTIL.set(without);
        let ((mut client, inner_client), (mut server, inner_server)) = (pair().await, pair().await);
        client.write_all(b"ab").await.unwrap();
        urgent(&client);
        client.write_all(last).await.unwrap();
        client.shutdown().await.unwrap();
        let (_registration, task) = forwarding((inner_client, b""), (inner_server, b""), deadlines(MINUTE, MINUTE));
        let mut heard = Vec::new();
        server.read_to_end(&mut heard).await.unwrap();
        assert_eq!(heard, [b"ab", last].concat());
        drop(server);
        let (end, sent, _) = task.await.unwrap();
        assert_eq!((end.cause, sent), (Cause::Done, heard.len() as u64));
    }
}

#[tokio::test]
async fn nothing_is_held_while_nothing_moves() {
    let ((mut client, inner_client), (mut server, inner_server)) = (pair().await, pair().await);
    let registration = registered();
    let entry = Arc::clone(registration.entry());
    let side = |socket| Side { socket, ahead: Vec::new() };
    let mut splice =
        Splice::new(side(&inner_client), side(&inner_server), entry.stopper(), deadlines(MINUTE, MINUTE), |_, _| ());
    for _ in 0..3 {
        client.write_all(b"question").await.unwrap();
        let mut heard = [0; 8];
        tokio::select! {
            end = &mut splice => panic!("{end:?}"),
            read = server.read_exact(&mut heard) => { read.unwrap(); }
        }
        assert_eq!(&heard, b"question");
        assert!(matches!((&splice.from_client.held, &splice.from_server.held), (Held::Nothing, Held::Nothing)));
        assert_eq!(PIPES.with_borrow(Vec::len), 1, "one pipe serves all that this thread forwards");
    }
}

#[tokio::test]
async fn a_reader_that_stands_still_holds_back_the_writer_and_loses_nothing() {
    let ((mut client, inner_client), (mut server, inner_server)) = (pair().await, pair().await);
    let (_registration, task) = forwarding((inner_client, b""), (inner_server, b""), deadlines(MINUTE, MINUTE));
    let sent = tokio::spawn(async move {
        // More than sockets and pipe hold.
        let bytes = pattern(32 * 1024 * 1024, 3);
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        (client, bytes)
    });
    tokio::time::timeout(Duration::from_millis(200), async {
        while !sent.is_finished() {
            tokio::task::yield_now().await
        }
    })
    .await
    .unwrap_err();
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).await.unwrap();
    let (client, bytes) = sent.await.unwrap();
    assert!(heard == bytes);
    drop((server, client));
    assert_eq!(task.await.unwrap().0.cause, Cause::Done);
}

#[tokio::test]
async fn half_closed_connections_go_on_until_their_time_is_over() {
    let ((mut client, inner_client), (mut server, inner_server)) = (pair().await, pair().await);
    let (_registration, task) =
        forwarding((inner_client, b""), (inner_server, b""), deadlines(MINUTE, Duration::from_millis(50)));
    client.write_all(b"last").await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = Vec::new();
    server.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"last");
    server.write_all(b"answer").await.unwrap();
    let mut answer = [0; 6];
    client.read_exact(&mut answer).await.unwrap();
    let (end, sent, received) = task.await.unwrap();
    assert_eq!((end.cause, sent, received), (Cause::HalfClosed, 4, 6));
}

#[tokio::test]
async fn silence_a_reset_and_a_stop_are_told_apart() {
    let ((_client, inner_client), (_server, inner_server)) = (pair().await, pair().await);
    let (_registration, task) =
        forwarding((inner_client, b""), (inner_server, b""), deadlines(Duration::from_millis(20), MINUTE));
    assert_eq!(task.await.unwrap().0.cause, Cause::Idle);

    let ((client, inner_client), (_server, inner_server)) = (pair().await, pair().await);
    let (_registration, task) = forwarding((inner_client, b""), (inner_server, b""), deadlines(MINUTE, MINUTE));
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(task.await.unwrap().0.cause, Cause::Reset);

    let ((_client, inner_client), (_server, inner_server)) = (pair().await, pair().await);
    let (registration, task) = forwarding((inner_client, b""), (inner_server, b""), deadlines(MINUTE, MINUTE));
    registration.entry().stop(Cause::PolicyChanged);
    assert_eq!(task.await.unwrap().0.cause, Cause::PolicyChanged);
}
