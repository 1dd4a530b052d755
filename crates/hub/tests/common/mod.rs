//! A server that says what a test has it say, and a folder with something beside it that must stay as it is.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use hub::{Endpoint, Hub, HubId, Result, Revision};
use serde_json::{Value, json};
use sha1::Digest;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a client asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub path: String,
    /// The first byte, and the last.
    pub range: Option<(usize, usize)>,
    pub token: Option<String>,
}

pub struct Server {
    pub address: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers every request by `answer`, and closes the connection.
    pub fn start(answer: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let server = Server {
            address,
            seen: Arc::clone(&seen),
        };
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
                std::thread::spawn(move || {
                    let mut stream = stream;
                    if let Some(request) = read(&stream) {
                        seen.lock().unwrap().push(request.clone());
                        answer(&request, &mut stream);
                    }
                });
            }
        });
        server
    }

    /// Lists files by `list`, and answers requests for files by `file`.
    pub fn with(
        list: Value,
        file: impl Fn(&Request, &mut TcpStream) + Send + Sync + 'static,
    ) -> Server {
        Server::start(move |request, stream| match request.is_list() {
            true => reply(stream, "200 OK", &[], list.to_string().as_bytes()),
            false => file(request, stream),
        })
    }

    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    pub fn fetch(&self, out: &Path) -> Result<()> {
        fetch(&self.address, None, "main", out)
    }
}

pub fn fetch(address: &str, token: Option<&str>, revision: &str, out: &Path) -> Result<()> {
    let hub = Hub::new(&Endpoint::parse(address)?, token)?;
    let id = HubId::parse("someone/Tiny")?;
    let snapshot = hub.snapshot(&id, &Revision::parse(revision)?)?;
    hub.fetch(&snapshot, out, &mut |_| {})
}

impl Request {
    pub fn is_list(&self) -> bool {
        self.path.starts_with("/api/models/")
    }

    pub fn file(&self) -> &str {
        self.path.rsplit('/').next().unwrap()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut request = Request {
        path: line.split(' ').nth(1)?.to_owned(),
        range: None,
        token: None,
    };
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim().split_once(": ") else {
            return Some(request);
        };
        match name.to_lowercase().as_str() {
            "range" => {
                let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
                request.range = Some((first.parse().ok()?, last.parse().ok()?));
            }
            "authorization" => request.token = Some(value.to_owned()),
            _ => {}
        }
    }
}

/// A whole answer. A client that has gone does not matter.
pub fn reply(stream: &mut TcpStream, status: &str, headers: &[&str], body: &[u8]) {
    let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    head.push_str(&format!("content-length: {}\r\n", body.len()));
    for header in headers {
        head.push_str(header);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(body);
}

/// The part of `bytes` that was asked for, as an honest server gives it, cut off after `cut` bytes.
pub fn reply_part(request: &Request, stream: &mut TcpStream, bytes: &[u8], cut: usize) {
    let (first, last) = request.range.unwrap();
    let part = &bytes[first..=last];
    let _ = write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nconnection: close\r\ncontent-range: bytes {first}-{last}/{}\r\ncontent-length: {}\r\n\r\n",
        bytes.len(),
        part.len()
    );
    let _ = stream.write_all(&part[..cut.min(part.len())]);
}

pub fn weights() -> Vec<u8> {
    (0..300_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    files::hex(&sha2::Sha256::digest(bytes))
}

/// How a list says a large file.
pub fn listed(name: &str, bytes: &[u8]) -> Value {
    json!({ "rfilename": name, "size": bytes.len(), "blobId": COMMIT, "lfs": { "sha256": sha256(bytes) } })
}

pub fn list(siblings: &[Value]) -> Value {
    json!({ "sha": COMMIT, "siblings": siblings })
}

/// Lists the weights alone.
pub fn weights_list() -> Value {
    list(&[listed("model.safetensors", &weights())])
}

/// A folder to fetch into, with other files around.
pub struct Sandbox {
    dir: tempfile::TempDir,
    before: BTreeMap<PathBuf, Vec<u8>>,
}

impl Sandbox {
    pub fn new() -> Sandbox {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("models")).unwrap();
        for name in ["victim", "victim.json", "models/victim.json"] {
            std::fs::write(dir.path().join(name), "mine").unwrap();
        }
        let before = files_around(dir.path());
        Sandbox { dir, before }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn out(&self) -> PathBuf {
        self.path("models/tiny")
    }

    pub fn part(&self) -> PathBuf {
        self.path("models/tiny.part")
    }

    /// Nothing but the folder and what is beside it was written.
    pub fn check(&self) {
        assert_eq!(files_around(self.dir.path()), self.before);
    }
}

fn files_around(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_ours = path.ends_with("models/tiny") || path.ends_with("models/tiny.part");
        match path.is_dir() {
            _ if is_ours => {}
            true => found.extend(files_around(&path)),
            false => {
                found.insert(path.clone(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}
