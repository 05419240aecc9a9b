//! The terminal: headings, lines with a time and a word, and one line of progress that is drawn over.
//!
//! Colours and progress only on a terminal; plain lines elsewhere.

use std::io::{self, Write};
use std::time::Instant;

/// What the reader's end can show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Style {
    /// Colours.
    pub(super) colour: bool,
    /// A line that is drawn over.
    pub(super) progress: bool,
}

impl Style {
    /// For stdout: see <https://no-color.org> for NO_COLOR.
    pub(super) fn of_stdout() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let terminal =
            io::IsTerminal::is_terminal(&io::stdout()) && std::env::var_os("TERM").is_none_or(|t| t != "dumb");
        Self { colour: terminal && !set("NO_COLOR"), progress: terminal }
    }
}

/// How a word is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    /// Something happened.
    Plain,
    /// As it should be.
    Good,
    /// Somebody was refused, as they should be.
    Refused,
    /// Not as it should be.
    Bad,
}

/// Where the story is told.
pub(super) struct Screen<'a> {
    out: &'a mut dyn Write,
    style: Style,
    began: Instant,
    chapter: usize,
    drawn: bool,
}

impl<'a> Screen<'a> {
    pub(super) fn new(out: &'a mut dyn Write, style: Style) -> Self {
        Self { out, style, began: Instant::now(), chapter: 0, drawn: false }
    }

    /// When the story began.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// A text in the colour of an escape code, where there are colours.
    pub(super) fn paint(&self, code: &str, text: &str) -> String {
        if self.style.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Faint.
    pub(super) fn faint(&self, text: &str) -> String {
        self.paint("2", text)
    }

    /// Bold.
    pub(super) fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn clear(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.drawn) {
            self.out.write_all(b"\r\x1b[2K")?;
        }
        Ok(())
    }

    /// A line as it is.
    pub(super) fn line(&mut self, text: &str) -> io::Result<()> {
        self.clear()?;
        writeln!(self.out, "{}", text.trim_end())?;
        self.out.flush()
    }

    /// Begins a chapter.
    pub(super) fn chapter(&mut self, title: &str) -> io::Result<()> {
        self.chapter += 1;
        let heading = self.bold(&format!("{}. {title}", self.chapter));
        self.line("")?;
        self.line(&heading)
    }

    /// A line of the story: when, a word, what.
    pub(super) fn tell(&mut self, tone: Tone, word: &str, what: &str) -> io::Result<()> {
        let when = self.faint(&format!("{:>6.2} s", self.began.elapsed().as_secs_f64()));
        let code = match tone {
            Tone::Plain => "36",
            Tone::Good => "32",
            Tone::Refused => "33",
            Tone::Bad => "1;31",
        };
        let word = self.paint(code, &format!("{word:<9}"));
        self.line(&format!("{when}  {word} {what}"))
    }

    /// More of the line before.
    pub(super) fn more(&mut self, what: &str) -> io::Result<()> {
        self.line(&format!("{:20}{what}", ""))
    }

    /// Draws the line of progress; nothing where that cannot be drawn over.
    pub(super) fn progress(&mut self, done: f64, what: &str) -> io::Result<()> {
        if !self.style.progress {
            return Ok(());
        }
        let full = (done.clamp(0.0, 1.0) * 20.0) as usize;
        let bar = format!("[{}{}]", "=".repeat(full), " ".repeat(20 - full));
        let text = self.faint(&format!("{:>6.2} s  {bar} {what}", self.began.elapsed().as_secs_f64()));
        self.drawn = true;
        write!(self.out, "\r\x1b[2K{text}")?;
        self.out.flush()
    }

    /// Takes the line of progress away.
    pub(super) fn rest(&mut self) -> io::Result<()> {
        self.clear()?;
        self.out.flush()
    }
}

/// A whole number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
