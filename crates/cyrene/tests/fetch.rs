//! `cyrene fetch` against a local server that speaks the Hub's protocol: listing, ranges, pinned commit, damaged and cut downloads.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha1::Digest;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does wrong, once.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The weights arrive with one byte changed.
    Damage,
    /// The connection breaks after this many bytes of the weights.
    CutAfter(usize),
}

struct Hub {
    endpoint: String,
    fault: Arc<Mutex<Fault>>,
    /// Bytes of the weights' body that were sent.
    sent: Arc<AtomicUsize>,
}

fn weights() -> Vec<u8> {
    (0..300_000u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Hub {
    fn start(fault: Fault) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Hub {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            fault: Arc::new(Mutex::new(fault)),
            sent: Arc::default(),
        };
        let (fault, sent) = (hub.fault.clone(), hub.sent.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (fault, sent) = (fault.clone(), sent.clone());
                std::thread::spawn(move || serve(stream, &fault, &sent));
            }
        });
        hub
    }

    fn fetch(&self, out: &Path) -> Output {
        Command::new(env!("CARGO_BIN_EXE_cyrene"))
            .args(["fetch", "someone/Tiny-Model", "--json", "--out"])
            .arg(out)
            .env("HF_ENDPOINT", &self.endpoint)
            .env_remove("HF_TOKEN")
            .output()
            .unwrap()
    }
}

fn files() -> HashMap<&'static str, Vec<u8>> {
    HashMap::from([
        ("config.json", b"{\"model_type\": \"qwen3_5\"}".to_vec()),
        ("model.safetensors", weights()),
        ("picture.png", vec![1, 2, 3]),
    ])
}

fn serve(mut stream: TcpStream, fault: &Mutex<Fault>, sent: &AtomicUsize) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request).unwrap_or(0) == 0 {
            return;
        }
        let mut range = None;
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            if header.trim().is_empty() {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("range: bytes=") {
                let (start, end) = value.trim().split_once('-').unwrap();
                range = Some((start.parse::<usize>().unwrap(), end.parse::<usize>().ok()));
            }
        }
        let path = request.split(' ').nth(1).unwrap().to_owned();
        let files = files();
        if path.starts_with("/api/models/someone/Tiny-Model") {
            let siblings: Vec<_> = files
                .iter()
                .map(|(name, bytes)| {
                    let blob = hex(&sha1::Sha1::digest([format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat()));
                    let mut sibling = serde_json::json!({ "rfilename": name, "size": bytes.len(), "blobId": blob });
                    if name.ends_with(".safetensors") {
                        sibling["lfs"] = serde_json::json!({ "sha256": hex(&sha2::Sha256::digest(bytes)), "size": bytes.len() });
                    }
                    sibling
                })
                .collect();
            let body = serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string();
            write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
            continue;
        }
        let name = path.rsplit('/').next().unwrap().to_owned();
        let known = path.starts_with(&format!("/someone/Tiny-Model/resolve/{COMMIT}/"));
        let Some(mut bytes) = files.get(name.as_str()).filter(|_| known).cloned() else {
            write!(
                stream,
                "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
            )
            .unwrap();
            continue;
        };
        let total = bytes.len();
        let (start, end) = range.map_or((0, total), |(start, end)| {
            (start, end.map_or(total, |end| end + 1))
        });
        if start >= total {
            write!(
                stream,
                "HTTP/1.1 416 Range Not Satisfiable\r\ncontent-length: 0\r\n\r\n"
            )
            .unwrap();
            continue;
        }
        let probe = end - start == 1;
        let is_weights = name == "model.safetensors" && !probe;
        let mut fault = fault.lock().unwrap();
        if is_weights && *fault == Fault::Damage {
            bytes[1000] ^= 1;
            *fault = Fault::None;
        }
        let mut body = &bytes[start..end];
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nx-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-range: bytes {start}-{}/{total}\r\ncontent-length: {}\r\n\r\n",
            hex(&sha2::Sha256::digest(name.as_bytes())),
            end - 1,
            body.len(),
        )
        .unwrap();
        let cut = match *fault {
            Fault::CutAfter(n) if is_weights => Some(n),
            _ => None,
        };
        if let Some(n) = cut {
            body = &body[..n.min(body.len())];
        }
        stream.write_all(body).unwrap();
        if is_weights {
            sent.fetch_add(body.len(), Ordering::SeqCst);
        }
        if cut.is_some() {
            // Retries of the client in the same run meet a dead host as well.
            *fault = Fault::CutAfter(0);
            return;
        }
    }
}

#[test]
fn fetch_gets_checked_files_at_a_pinned_commit() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny");
    let hub = Hub::start(Fault::None);
    let output = hub.fetch(&out);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        std::fs::read(out.join("model.safetensors")).unwrap(),
        weights()
    );
    assert!(out.join("config.json").exists() && !out.join("picture.png").exists());
    let record: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("fetch.json")).unwrap()).unwrap();
    assert_eq!(record["commit"], COMMIT);
    assert!(!dir.path().join("tiny.part").exists());

    // A second time nothing is asked for.
    let before = hub.sent.load(Ordering::SeqCst);
    assert!(hub.fetch(&out).status.success());
    assert_eq!(hub.sent.load(Ordering::SeqCst), before);
}

#[test]
fn fetch_goes_on_where_a_cut_download_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny");
    let hub = Hub::start(Fault::CutAfter(120_000));
    let output = hub.fetch(&out);
    assert_eq!(output.status.code(), Some(1));
    assert!(!out.exists(), "a half folder must not get its name");
    assert!(String::from_utf8_lossy(&output.stderr).contains("run the same command again"));

    *hub.fault.lock().unwrap() = Fault::None;
    let output = hub.fetch(&out);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        std::fs::read(out.join("model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(
        hub.sent.load(Ordering::SeqCst),
        weights().len(),
        "no byte came twice"
    );
}

#[test]
fn fetch_refuses_a_damaged_file_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("tiny");
    let hub = Hub::start(Fault::Damage);
    let output = hub.fetch(&out);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("differs from its published hash"));
    assert!(!out.exists());
    assert!(hub.fetch(&out).status.success());
    assert_eq!(
        std::fs::read(out.join("model.safetensors")).unwrap(),
        weights()
    );
}

#[test]
fn fetch_names_the_remedy_when_the_host_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_cyrene"))
        .args(["fetch", "someone/Tiny-Model", "--out"])
        .arg(dir.path().join("tiny"))
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("HF_ENDPOINT"));
}
