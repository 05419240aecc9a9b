//! Whether this kernel keeps, for sockets of the table, what applications take for granted of TCP.
//!
//! Each trial has a fresh connection over loopback, within a few seconds and a few mebibytes. On plain TCP all of them pass,
//! which a unit test holds; so what fails in the table fails because of it.

use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use rustix::pipe::SpliceFlags;
use socket2::SockRef;

use super::programs::Programs;

/// How long one call may wait for bytes that are there.
const PATIENCE: Duration = Duration::from_millis(500);
/// What both sockets may hold, together, and much more than TCP lets them.
const MOST_QUEUED: usize = 8 << 20;
/// What is asked of the kernel for each of the two queues.
const QUEUE: usize = 64 << 10;
const BLOCK: usize = 16 << 10;

/// What is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trial {
    /// A reader that does not read stops the writer.
    BackPressure,
    /// A reader that uses splice(2), as proxies do, gets every byte.
    Splice,
    /// After shutdown(2) of one direction the other one goes on.
    HalfClose,
    /// Urgent data (RFC 6093) arrives, and beside the stream.
    Urgent,
    /// What was sent before the sockets came into the table is read before what was sent after.
    Order,
}

impl Trial {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::BackPressure, Self::Splice, Self::HalfClose, Self::Urgent, Self::Order];

    /// As `/state` and metrics name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BackPressure => "back-pressure",
            Self::Splice => "splice",
            Self::HalfClose => "half-close",
            Self::Urgent => "urgent data",
            Self::Order => "order",
        }
    }
}

/// A trial that the kernel has not passed, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Which one.
    pub trial: Trial,
    /// What happened.
    pub how: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.trial.as_str(), self.how)
    }
}

/// Runs all trials with sockets of the table of `programs`, or with plain ones.
pub fn failed(programs: Option<&Programs>) -> Vec<Failed> {
    let run = |trial: Trial| match passes(trial, programs) {
        Ok(()) => None,
        Err(how) => Some(Failed { trial, how }),
    };
    Trial::ALL.into_iter().filter_map(run).collect()
}

fn passes(trial: Trial, programs: Option<&Programs>) -> Result<(), String> {
    let pair = Pair::open(programs)?;
    match trial {
        Trial::Order => order(pair),
        Trial::BackPressure => back_pressure(pair.enter()?),
        Trial::Splice => splice(pair.enter()?),
        Trial::HalfClose => half_close(pair.enter()?),
        Trial::Urgent => urgent(pair.enter()?),
    }
}

/// Two ends of a connection.
struct Pair<'a> {
    one: TcpStream,
    other: TcpStream,
    programs: Option<&'a Programs>,
}

impl<'a> Pair<'a> {
    fn open(programs: Option<&'a Programs>) -> Result<Self, String> {
        let opened = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            SockRef::from(&listener).set_recv_buffer_size(QUEUE)?;
            let one = TcpStream::connect(listener.local_addr()?)?;
            let (other, from) = listener.accept()?;
            if from != one.local_addr()? {
                return Err(io::Error::other("somebody else has connected"));
            }
            for end in [&one, &other] {
                end.set_nodelay(true)?;
                end.set_read_timeout(Some(PATIENCE))?;
                end.set_write_timeout(Some(PATIENCE))?;
                SockRef::from(end).set_send_buffer_size(QUEUE)?;
            }
            Ok((one, other))
        };
        let (one, other) = opened().map_err(|error| format!("no connection over loopback: {error}"))?;
        Ok(Self { one, other, programs })
    }

    /// Puts both ends into the table.
    fn enter(self) -> Result<Self, String> {
        if let Some(programs) = self.programs {
            programs.add(&self.one)?;
            programs.add(&self.other)?;
        }
        Ok(self)
    }
}

fn pattern(length: usize) -> Vec<u8> {
    // A period that no block size is a multiple of.
    (0..=250).cycle().take(length).collect()
}

fn wrong(what: &str) -> impl Fn(io::Error) -> String {
    move |error| format!("{what}: {error}")
}

fn back_pressure(mut pair: Pair<'_>) -> Result<(), String> {
    pair.one.set_nonblocking(true).map_err(wrong("a socket"))?;
    let block = pattern(BLOCK);
    let mut queued = 0;
    while queued < MOST_QUEUED {
        match pair.one.write(&block) {
            Ok(written) => queued += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(format!("a writer whose reader does not read is told: {error}")),
        }
    }
    Err(format!("a reader that does not read lets {} MiB queue, and more", queued >> 20))
}

fn splice(mut pair: Pair<'_>) -> Result<(), String> {
    let sent = pattern(BLOCK);
    pair.one.write_all(&sent).map_err(wrong("writing"))?;
    let (out, into) = rustix::pipe::pipe().map_err(|error| format!("a pipe: {error}"))?;
    let mut moved = 0;
    while moved < sent.len() {
        match rustix::pipe::splice(&pair.other, None, &into, None, sent.len() - moved, SpliceFlags::empty()) {
            Ok(0) => break,
            Ok(length) => moved += length,
            Err(error) => return Err(format!("of {BLOCK} bytes {moved} come through, and then: {error}")),
        }
    }
    drop(into);
    let mut got = Vec::new();
    std::fs::File::from(out).read_to_end(&mut got).map_err(wrong("the pipe"))?;
    same(&sent, &got)
}

fn half_close(mut pair: Pair<'_>) -> Result<(), String> {
    let sent = pattern(BLOCK);
    pair.one.write_all(&sent).map_err(wrong("writing"))?;
    pair.one.shutdown(Shutdown::Write).map_err(wrong("shutdown"))?;
    let mut got = Vec::new();
    pair.other.read_to_end(&mut got).map_err(wrong("reading to the end of a half-closed connection"))?;
    same(&sent, &got)?;
    pair.other.write_all(&sent).map_err(wrong("writing to who has closed his own direction"))?;
    drop(pair.other);
    got.clear();
    pair.one.read_to_end(&mut got).map_err(wrong("reading the other direction"))?;
    same(&sent, &got)
}

fn urgent(mut pair: Pair<'_>) -> Result<(), String> {
    pair.one.write_all(b"ab").map_err(wrong("writing"))?;
    SockRef::from(&pair.one).send_out_of_band(b"!").map_err(wrong("sending urgent data"))?;
    pair.one.write_all(b"cd").map_err(wrong("writing"))?;
    let mut byte = [std::mem::MaybeUninit::uninit(); 1];
    let received = SockRef::from(&pair.other).recv_out_of_band(&mut byte);
    if received.map_err(wrong("the urgent byte does not arrive as such"))? != 1 {
        return Err("the urgent byte does not arrive as such".to_owned());
    }
    let mut got = [0; 4];
    pair.other.read_exact(&mut got).map_err(wrong("reading beside the urgent byte"))?;
    same(b"abcd", &got)
}

fn order(mut pair: Pair<'_>) -> Result<(), String> {
    let sent = pattern(2 * BLOCK);
    let (first, second) = sent.split_at(BLOCK);
    pair.one.write_all(first).map_err(wrong("writing"))?;
    let mut pair = pair.enter()?;
    pair.one.write_all(second).map_err(wrong("writing"))?;
    let mut got = vec![0; sent.len()];
    pair.other.read_exact(&mut got).map_err(wrong("reading"))?;
    same(&sent, &got)
}

fn same(sent: &[u8], got: &[u8]) -> Result<(), String> {
    if sent.len() != got.len() {
        return Err(format!("of {} bytes {} arrive", sent.len(), got.len()));
    }
    match sent.iter().zip(got).position(|(sent, got)| sent != got) {
        None => Ok(()),
        Some(place) => Err(format!("byte {place} of {} is not the one that was sent", sent.len())),
    }
}
