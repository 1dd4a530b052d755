//! Files from outside, which may be anything: only regular ones are opened, and no more is read than is bearable.
//!
//! These are used as their likes of `std::fs` are: the caller says in its own words what it read, and the error here why it was refused.

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, ErrorKind, Read};
use std::path::Path;

/// The most that is read of a file of settings: configurations, indexes, templates, personas, recipes, characters.
pub const MOST_SETTINGS_BYTES: u64 = 64 << 20;

/// The most that is read whole of a file of data, packed or not: rows, tokenizers, splits, manifests.
pub const MOST_DATA_BYTES: u64 = 4 << 30;

/// The longest line, or row, of a file of data.
pub const MOST_LINE_BYTES: u64 = 64 << 20;

/// How many times its size a packed file may unpack to; stories and tokenizers take up a third to a tenth when they are packed.
const MOST_TIMES: u64 = 200;

/// What any packed file may unpack to, however small it is: short files of repeated lines pack better than any real one.
const UNPACKED_ANYWAY: u64 = 64 << 20;

/// More than is read of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    /// A file that is too large.
    #[error("it holds more than {} MiB, and no more is read of such a file", .most >> 20)]
    File {
        /// The limit in bytes.
        most: u64,
    },
    /// A packed file that is too large when it is unpacked.
    #[error(
        "it unpacks to more than {} MiB, and no more is taken of a packed file of {packed} bytes ({} times its size, at least {} MiB, at most {} MiB); unpack it first if it is what it should be", .most >> 20, MOST_TIMES, UNPACKED_ANYWAY >> 20, MOST_DATA_BYTES >> 20
    )]
    Unpacked {
        /// The limit in bytes.
        most: u64,
        /// Bytes of the packed file.
        packed: u64,
    },
    /// A line that is too long.
    #[error("a line holds more than {} MiB, and no more is read of one; cut it into several", MOST_LINE_BYTES >> 20)]
    Line,
}

impl TooMuch {
    /// Whether a reading ended because there was more than is read.
    pub fn is(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|error| error.is::<TooMuch>())
    }
}

impl From<TooMuch> for io::Error {
    fn from(error: TooMuch) -> Self {
        io::Error::new(ErrorKind::FileTooLarge, error)
    }
}

/// Opens a regular file for reading, or what a link to one leads to.
///
/// # Errors
/// The system refuses; there is a folder, a pipe, a device or a socket.
pub fn open(path: &Path) -> io::Result<File> {
    // Asked first, because opening a pipe waits for somebody who writes; the open file is what counts.
    check_regular(&fs::metadata(path)?)?;
    let mut options = File::options();
    options.read(true);
    never_wait(&mut options);
    let file = options.open(path)?;
    check_regular(&file.metadata()?)?;
    Ok(file)
}

/// The bytes of a regular file.
///
/// # Errors
/// As [`open`]; [`TooMuch::File`] where there are more than `most`.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let file = open(path)?;
    let length = file.metadata()?.len();
    if length > most {
        return Err(TooMuch::File { most }.into());
    }
    let mut bytes = Vec::new();
    let room = usize::try_from(length).map_err(|_| ErrorKind::OutOfMemory)?;
    bytes
        .try_reserve_exact(room)
        .map_err(|_| ErrorKind::OutOfMemory)?;
    // A file may grow meanwhile.
    Bounded::new(file, most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// As [`read`], and of a pipe too, to its end: a shell puts one in place of a file (`<(...)`).
///
/// # Errors
/// As [`read`].
pub fn read_or_pipe(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    if !is_pipe(&fs::metadata(path)?) {
        return read(path, most);
    }
    let mut bytes = Vec::new();
    Bounded::new(File::open(path)?, most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text of a regular file of settings.
///
/// # Errors
/// As [`read`]; it is not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    let bytes = read(path, MOST_SETTINGS_BYTES)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let problem = format!("it is not UTF-8 at byte {at}");
        io::Error::new(ErrorKind::InvalidData, problem)
    })
}

/// Appends a line with its end to `line`, and gives its bytes: 0 at the end of the input.
///
/// # Errors
/// What the input says; [`TooMuch::Line`].
pub fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    let mut some = input.by_ref().take(MOST_LINE_BYTES + 1);
    let n = some.read_until(b'\n', line)?;
    match n as u64 > MOST_LINE_BYTES {
        true => Err(TooMuch::Line.into()),
        false => Ok(n),
    }
}

/// A reader that ends in an error where more comes than is allowed.
#[derive(Debug)]
pub struct Bounded<R> {
    inner: R,
    left: u64,
    beyond: TooMuch,
}

impl<R: Read> Bounded<R> {
    /// At most so many bytes.
    pub fn new(inner: R, most: u64) -> Self {
        Bounded {
            inner,
            left: most,
            beyond: TooMuch::File { most },
        }
    }

    /// What a decoder makes of a file of `packed` bytes.
    pub fn unpacking(decoder: R, packed: u64) -> Self {
        let most = packed.saturating_mul(MOST_TIMES);
        let most = most.clamp(UNPACKED_ANYWAY, MOST_DATA_BYTES);
        Bounded {
            inner: decoder,
            left: most,
            beyond: TooMuch::Unpacked { most, packed },
        }
    }
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // One byte more than is allowed shows that there is one.
        let room = usize::try_from(self.left.saturating_add(1)).unwrap_or(usize::MAX);
        let room = room.min(buffer.len());
        let n = self.inner.read(&mut buffer[..room])?;
        match self.left.checked_sub(n as u64) {
            Some(left) => self.left = left,
            None => return Err(self.beyond.into()),
        }
        Ok(n)
    }
}

fn check_regular(meta: &Metadata) -> io::Result<()> {
    if meta.is_file() {
        return Ok(());
    }
    let problem = format!("it is {}, and only regular files are read", kind(meta));
    Err(io::Error::new(ErrorKind::InvalidInput, problem))
}

#[cfg(unix)]
fn kind(meta: &Metadata) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    let kind = meta.file_type();
    match kind {
        _ if kind.is_dir() => "a folder",
        _ if kind.is_fifo() => "a pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    }
}

#[cfg(not(unix))]
fn kind(meta: &Metadata) -> &'static str {
    match meta.is_dir() {
        true => "a folder",
        false => "no file",
    }
}

#[cfg(unix)]
fn is_pipe(meta: &Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.file_type().is_fifo()
}

#[cfg(not(unix))]
fn is_pipe(_: &Metadata) -> bool {
    false
}

#[cfg(unix)]
fn never_wait(options: &mut fs::OpenOptions) {
    use std::os::unix::fs::OpenOptionsExt;
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
}

#[cfg(not(unix))]
fn never_wait(_: &mut fs::OpenOptions) {}

#[cfg(test)]
mod tests {
    use std::io::{BufReader, repeat};

    use super::*;

    #[test]
    fn regular_file_is_read_up_to_the_limit_and_not_beyond() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "abc").unwrap();
        assert_eq!(read(&path, 3).unwrap(), b"abc");
        assert_eq!(read_text(&path).unwrap(), "abc");
        let error = read(&path, 2).unwrap_err();
        assert!(TooMuch::is(&error), "{error}");
        fs::write(&path, b"ab\xff").unwrap();
        let error = read_text(&path).unwrap_err().to_string();
        assert!(error.contains("not UTF-8 at byte 2"), "{error}");
        let missing = read(&dir.path().join("b"), 2).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn folder_is_refused_by_what_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("it is a folder"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn pipe_device_and_socket_are_refused_at_once_and_a_link_to_a_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let made = std::process::Command::new("mkfifo")
            .arg(path("pipe"))
            .status();
        assert!(made.unwrap().success());
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        fs::write(path("file"), "abc").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        std::os::unix::fs::symlink(path("pipe"), path("link to a pipe")).unwrap();
        assert_eq!(read(&path("link"), 9).unwrap(), b"abc");
        for (name, kind) in [
            (path("pipe"), "a pipe"),
            (path("link to a pipe"), "a pipe"),
            (path("socket"), "a socket"),
            ("/dev/zero".into(), "a device"),
        ] {
            let error = read(&name, 9).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
        }
        assert!(read_or_pipe(Path::new("/dev/zero"), 9).is_err());
        let pipe = path("pipe");
        let write = |bytes: &'static [u8]| {
            let pipe = pipe.clone();
            std::thread::spawn(move || fs::write(pipe, bytes))
        };
        let writer = write(b"abc");
        assert_eq!(read_or_pipe(&pipe, 3).unwrap(), b"abc");
        writer.join().unwrap().unwrap();
        let writer = write(b"abcd");
        let error = read_or_pipe(&pipe, 3).unwrap_err();
        assert!(TooMuch::is(&error), "{error}");
        // Its reader is gone then, which it may or may not notice.
        let _ = writer.join().unwrap();
    }

    #[test]
    fn packed_file_unpacks_to_its_multiple_and_no_further() {
        let unpacked = |n: u64, packed: u64| {
            let mut all = Bounded::unpacking(repeat(b'a').take(n), packed);
            io::copy(&mut all, &mut io::sink())
        };
        assert_eq!(unpacked(UNPACKED_ANYWAY, 1).unwrap(), UNPACKED_ANYWAY);
        let error = unpacked(UNPACKED_ANYWAY + 1, 1).unwrap_err();
        assert!(TooMuch::is(&error));
        assert!(error.to_string().contains("more than 64 MiB"), "{error}");
        let packed = UNPACKED_ANYWAY / 100;
        let most = packed * MOST_TIMES;
        assert_eq!(unpacked(most, packed).unwrap(), most);
        assert!(TooMuch::is(&unpacked(most + 1, packed).unwrap_err()));
        let large = Bounded::unpacking(io::empty(), u64::MAX);
        assert_eq!(large.left, MOST_DATA_BYTES);
    }

    #[test]
    fn line_of_any_length_is_read_up_to_the_limit() {
        let mut line = Vec::new();
        let mut input = BufReader::new(&b"a\nbc"[..]);
        assert_eq!(read_line(&mut input, &mut line).unwrap(), 2);
        assert_eq!(read_line(&mut input, &mut line).unwrap(), 2);
        assert_eq!(read_line(&mut input, &mut line).unwrap(), 0);
        assert_eq!(line, b"a\nbc");
        let mut endless = BufReader::new(repeat(b'a'));
        let error = read_line(&mut endless, &mut Vec::new()).unwrap_err();
        assert!(TooMuch::is(&error) && error.to_string().contains("64 MiB"));
    }
}
