//! The configuration socket: `/var/run/wireguard/IFACE.sock`.

mod listener;
mod parse;
mod render;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};

use nix::errno::Errno;
use zeroize::Zeroizing;

use crate::device::{Device, DeviceUpdate};
use crate::process::wipe_stack;
pub(crate) use listener::Listener;
use parse::Parser;

/// Longer lines are refused, bytes. The longest with a meaning is a key's.
const LINE: usize = 4096;

/// What a configuration socket configures.
pub(crate) trait Configurable {
    /// Keys, peers and their state.
    fn device(&self) -> &Device;

    /// The port in use, 0 if none is.
    fn listen_port(&self) -> u16;

    /// 0 for none.
    fn fwmark(&self) -> u32;

    /// Applies a whole update or nothing of it.
    ///
    /// # Errors
    /// EADDRINUSE for a taken port, EPERM for a mark without CAP_NET_ADMIN.
    fn set(&self, update: &DeviceUpdate) -> Result<(), Errno>;
}

/// Serves one connection: requests and answers, one after the other, until the client closes
/// it or sends something else.
///
/// # Errors
/// Of the stream.
pub(crate) fn serve<S>(stream: S, target: &impl Configurable) -> io::Result<()>
where
    S: Read + Write,
{
    let mut lines = Lines::new(stream);
    loop {
        let result = match lines.next()? {
            Line::Text("get=1") => {
                let end = matches!(lines.next()?, Line::Text(""));
                if end { get(lines.stream(), target)? } else { Err(Errno::EINVAL) }
            }
            Line::Text("set=1") => set(&mut lines, target)?,
            _ => return Ok(()),
        };
        wipe_stack();
        let code = result.err().map_or(0, |errno| -(errno as i32));
        write!(lines.stream(), "errno={code}\n\n")?;
        lines.stream().flush()?;
    }
}

fn get(stream: impl Write, target: &impl Configurable) -> io::Result<Result<(), Errno>> {
    render::render(target.device(), target.listen_port(), target.fwmark(), stream)?;
    Ok(Ok(()))
}

/// Reads the whole request, also after a mistake in it, so that the answer is read by a
/// client that writes all before it reads. Its frame is not the caller's, who wipes it.
#[inline(never)]
fn set<S: Read + Write>(
    lines: &mut Lines<S>,
    target: &impl Configurable,
) -> io::Result<Result<(), Errno>> {
    let mut parser = Parser::default();
    let mut result = Ok(());
    loop {
        let parsed = match lines.next()? {
            Line::Text("") => break,
            Line::Text(line) => parser.line(line),
            Line::Bad => Err(Errno::EINVAL),
            // Cut off: nothing is applied.
            Line::End => return Ok(Err(Errno::EPROTO)),
        };
        result = result.and(parsed);
    }
    Ok(result.and_then(|()| target.set(&parser.finish())))
}

/// A line of a request, without its end.
enum Line<'a> {
    Text(&'a str),
    /// Too long, or not text.
    Bad,
    /// The client has closed its side.
    End,
}

/// Splits a stream into lines in a buffer that never moves and is wiped at the end.
struct Lines<S> {
    stream: S,
    buffer: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
}

impl<S: Read> Lines<S> {
    fn new(stream: S) -> Self {
        Self { stream, buffer: Zeroizing::new(vec![0; 16 * LINE]), start: 0, end: 0 }
    }

    fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    fn next(&mut self) -> io::Result<Line<'_>> {
        let mut too_long = false;
        loop {
            let unread = &self.buffer[self.start..self.end];
            if let Some(len) = unread.iter().position(|byte| *byte == b'\n') {
                let line = self.start..self.start + len;
                self.start += len + 1;
                return Ok(match std::str::from_utf8(&self.buffer[line]) {
                    Ok(text) if !too_long && text.len() <= LINE => Line::Text(text),
                    _ => Line::Bad,
                });
            }
            if unread.len() > LINE {
                too_long = true;
                self.start = self.end;
            }
            if !self.fill()? {
                return Ok(Line::End);
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            match self.stream.read(&mut self.buffer[self.end..]) {
                Ok(len) => {
                    self.end += len;
                    return Ok(len > 0);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
