//! A mirror that lies, in each way that is known: nothing outside the folder is written, nothing reaches the terminal as it came, and what
//! can be had honestly is had.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{
    COMMIT, Request, Sandbox, Server, fetch, list, listed, reply, reply_part, sha256, weights,
    weights_list,
};
use hub::Error;
use serde_json::{Value, json};

fn honest(request: &Request, stream: &mut TcpStream) {
    reply_part(request, stream, &weights(), usize::MAX);
}

/// The error as a user reads it, with its causes.
fn said(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

/// A fetch must end in an error that holds `reason`, and leave everything around as it was.
#[track_caller]
fn refused(server: &Server, reason: &str) {
    let sandbox = Sandbox::new();
    refused_in(&sandbox, server, reason);
}

#[track_caller]
fn refused_in(sandbox: &Sandbox, server: &Server, reason: &str) {
    let error = said(&server.fetch(&sandbox.out()).unwrap_err());
    assert!(error.contains(reason), "expected `{reason}`: {error}");
    assert!(!error.contains(char::is_control), "{error:?}");
    assert!(!sandbox.out().exists());
    sandbox.check();
}

#[track_caller]
fn fetched_in(sandbox: &Sandbox, server: &Server) {
    let result = server.fetch(&sandbox.out());
    assert!(result.is_ok(), "{}", said(&result.unwrap_err()));
    let got = std::fs::read(sandbox.out().join("model.safetensors")).unwrap();
    assert!(got == weights());
    assert!(!sandbox.part().exists());
    sandbox.check();
}

#[test]
fn commit_that_is_none_becomes_no_path() {
    let sandbox = Sandbox::new();
    let victim = sandbox.path("victim");
    let commits = [
        json!(victim),
        json!("../../victim"),
        json!(".."),
        json!(COMMIT.to_uppercase()),
        json!(&COMMIT[..39]),
        json!(format!("{COMMIT}0")),
        json!(format!("{}\u{1b}[2J", &COMMIT[..36])),
        json!(""),
        json!(7),
        json!(null),
    ];
    for commit in commits {
        let mut list = weights_list();
        list["sha"] = commit.clone();
        let server = Server::with(list, honest);
        let reason = match commit.is_string() {
            true => "is no commit",
            false => "no list",
        };
        refused_in(&sandbox, &server, reason);
        assert_eq!(server.seen().len(), 1, "asked for files of {commit}");
    }
}

#[test]
fn other_commit_than_the_one_asked_for_is_refused() {
    let sandbox = Sandbox::new();
    let server = Server::with(weights_list(), honest);
    let asked = "f".repeat(40);
    let error = fetch(&server.address, None, &asked, &sandbox.out()).unwrap_err();
    assert!(matches!(error, Error::OtherCommit { .. }), "{error}");
}

/// hf-hub made `x-repo-commit` the contents of a file and ETags the names of others.
#[test]
fn headers_name_no_files() {
    let server = Server::with(weights_list(), |request, stream| {
        assert!(request.range.is_some());
        let headers = [
            "x-repo-commit: ../../../victim",
            "etag: \"../../../victim\"",
            "x-linked-etag: \"../../../../victim\"",
            "x-linked-size: 1",
            "content-disposition: attachment; filename=\"../victim\"",
        ];
        reply(stream, "200 OK", &headers, &weights());
    });
    let sandbox = Sandbox::new();
    fetched_in(&sandbox, &server);
    let names = std::fs::read_dir(sandbox.out()).unwrap();
    let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["fetch.json", "model.safetensors"]);
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let sandbox = Sandbox::new();
    let victim = sandbox.path("victim.json");
    for name in [
        "..\\victim.json",
        "C:\\victim.json",
        "C:victim.json",
        "victim\0.json",
        "victim\n.json",
        "\u{1b}]0;x\u{7}.json",
        "\u{202e}nosj.json",
        "CON.json",
        "nul.txt",
        "com1.json",
        "LPT9 .txt",
        "LICENSE.",
        "LICENSE ",
        "x:stream.json",
        "MODEL~1.json",
        "fetch.json",
        "LICENSE.incomplete",
        &format!("{}.json", "a".repeat(300)),
    ] {
        let server = Server::with(
            list(&[
                listed(name, b"evil"),
                listed("model.safetensors", &weights()),
            ]),
            honest,
        );
        refused_in(&sandbox, &server, "name");
        assert_eq!(server.seen().len(), 1, "asked for {name:?}");
    }
    // What lies in folders is not wanted, wherever the folder is.
    for name in [
        "../victim.json",
        "a/../../victim.json",
        "/etc/victim.json",
        victim.to_str().unwrap(),
    ] {
        let siblings = [
            listed(name, b"evil"),
            listed("model.safetensors", &weights()),
        ];
        fetched_in(&Sandbox::new(), &Server::with(list(&siblings), honest));
    }
}

#[test]
fn two_files_of_one_name_are_refused() {
    for (first, second) in [
        ("model.safetensors", "model.safetensors"),
        ("config.json", "CONFIG.json"),
        ("größe.json", "GRÖßE.json"),
    ] {
        let siblings = [
            listed("weights.safetensors", &weights()),
            listed(first, b"a"),
            listed(second, b"b"),
        ];
        refused(&Server::with(list(&siblings), honest), "listed twice");
    }
}

#[test]
fn hashes_that_are_none_are_refused() {
    let name = "model.safetensors";
    let cases = [
        (json!({ "blobId": "z".repeat(40) }), "no git blob id"),
        (json!({ "blobId": "../../victim" }), "no git blob id"),
        (
            json!({ "blobId": COMMIT, "lfs": { "sha256": sha256(b"x").to_uppercase() } }),
            "no SHA-256",
        ),
        (
            json!({ "blobId": COMMIT, "lfs": { "sha256": "../../victim" } }),
            "no SHA-256",
        ),
        (json!({ "blobId": COMMIT, "lfs": {} }), "no SHA-256"),
        (json!({}), "no hash"),
        (json!({ "blobId": 7 }), "no list"),
    ];
    for (mut file, reason) in cases {
        file["rfilename"] = json!(name);
        file["size"] = json!(1);
        refused(&Server::with(list(&[file]), honest), reason);
    }
}

#[test]
fn answer_that_is_no_list_is_refused() {
    let nested = "[".repeat(100_000);
    let bodies = [
        ("<html>not found</html>", "no list"),
        ("", "no list"),
        ("[]", "no list"),
        ("{}", "no list"),
        ("{\"sha\": \"x\", \"siblings\": {}}", "no list"),
        (
            "{\"sha\": \"\u{1b}[2J\", \"siblings\": \"\u{9b}2J\"}",
            "no list",
        ),
        (nested.as_str(), "no list"),
    ];
    for (body, reason) in bodies {
        let body = body.to_owned();
        let server = Server::start(move |_, stream| reply(stream, "200 OK", &[], body.as_bytes()));
        refused(&server, reason);
    }
    let many = list(&vec![json!({ "rfilename": "x" }); 5000]);
    refused(&Server::with(many, honest), "4096");
}

/// Sends `piece` until the client has enough; counts the bytes.
fn endless(head: &str, piece: &'static str, sent: &AtomicUsize, stream: &mut TcpStream) {
    let piece = piece.repeat(4096);
    let mut written = stream.write_all(head.as_bytes());
    while written.is_ok() && sent.load(Ordering::SeqCst) < 1 << 30 {
        written = stream.write_all(piece.as_bytes());
        sent.fetch_add(piece.len(), Ordering::SeqCst);
    }
}

#[test]
fn list_without_end_is_cut_off() {
    for head in [
        "HTTP/1.1 200 OK\r\n\r\n[",
        "HTTP/1.1 200 OK\r\ncontent-length: 1099511627776\r\n\r\n[",
    ] {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let server = Server::start(move |_, stream| endless(head, "{},", &counter, stream));
        refused(&server, "larger than");
        let sent = sent.load(Ordering::SeqCst);
        assert!(sent < 64 << 20, "{sent} bytes were taken");
    }
}

/// A file announced as 1,000 bytes was written on to 11.6 GB.
#[test]
fn body_beyond_the_announced_size_is_cut_off_at_once() {
    let mut short = listed("model.safetensors", &weights());
    short["size"] = json!(1000);
    for (head, reason) in [
        ("HTTP/1.1 200 OK\r\n\r\n", "was cut off"),
        (
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40000000\r\n",
            "was cut off",
        ),
        (
            "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes 0-999/1000\r\n\r\n",
            "was cut off",
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 12000000000\r\n\r\n",
            "sends 12000000000 bytes where 1000 were listed",
        ),
    ] {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let server = Server::with(list(&[short.clone()]), move |_, stream| {
            endless(head, "evil", &counter, stream);
        });
        let sandbox = Sandbox::new();
        refused_in(&sandbox, &server, reason);
        let sent = sent.load(Ordering::SeqCst);
        assert!(sent < 32 << 20, "{sent} bytes were taken");
        let part = sandbox.part().join("model.safetensors.incomplete");
        assert_eq!(std::fs::metadata(part).unwrap().len(), 0);
        assert_eq!(server.seen().len(), 2, "a lie is not asked for again");
    }
}

#[test]
fn sizes_that_no_disk_has_are_refused_before_anything_is_asked_for() {
    let sandbox = Sandbox::new();
    let free = files::disk_free(&sandbox.out()).unwrap();
    let cases: [(Vec<Value>, &str); 5] = [
        (vec![json!(1_u64 << 63)], "TiB"),
        (vec![json!(u64::MAX), json!(2)], "TiB"),
        (vec![json!(-1)], "no list"),
        (vec![json!("9")], "no list"),
        (vec![json!(hub::MAX_BYTES - 1000)], "MiB are needed"),
    ];
    for (sizes, reason) in cases {
        let siblings: Vec<Value> = sizes
            .iter()
            .enumerate()
            .map(|(n, size)| {
                let mut file = listed(&format!("{n}.safetensors"), b"");
                file["size"] = size.clone();
                file
            })
            .collect();
        let server = Server::with(list(&siblings), honest);
        if reason == "MiB are needed" && free >= hub::MAX_BYTES {
            continue;
        }
        refused_in(&sandbox, &server, reason);
        assert_eq!(server.seen().len(), 1);
    }
}

#[test]
fn part_that_was_not_asked_for_is_refused() {
    let size = weights().len();
    let last = size - 1;
    for range in [
        format!("content-range: bytes 1-{last}/{size}"),
        format!("content-range: bytes 0-{size}/{size}"),
        format!("content-range: bytes 0-{last}/{}", size + 1),
        format!("content-range: bytes {last}-0/{size}"),
        "content-range: bytes 0-18446744073709551615/18446744073709551615".to_owned(),
        "content-range: bytes */300000".to_owned(),
        "content-range: evil".to_owned(),
        "x: y".to_owned(),
    ] {
        let server = Server::with(weights_list(), move |_, stream| {
            reply(stream, "206 Partial Content", &[&range], &weights());
        });
        refused(&server, "was asked for bytes 0 to 299999");
    }
}

#[test]
fn smaller_parts_than_asked_for_are_put_together() {
    let server = Server::with(weights_list(), |request, stream| {
        let (first, last) = request.range.unwrap();
        let less = last.min(first + 99_999);
        let request = Request {
            range: Some((first, less)),
            ..request.clone()
        };
        honest(&request, stream);
    });
    fetched_in(&Sandbox::new(), &server);
    assert_eq!(server.seen().len(), 1 + 3);
}

#[test]
fn whole_file_in_answer_to_a_range_starts_it_anew() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.part()).unwrap();
    let begun = sandbox.part().join("model.safetensors.incomplete");
    std::fs::write(begun, vec![7; 100_000]).unwrap();
    let server = Server::with(weights_list(), |request, stream| {
        assert_eq!(request.range.unwrap().0, 100_000);
        reply(stream, "200 OK", &[], &weights());
    });
    fetched_in(&sandbox, &server);
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn cut_download_goes_on_where_it_stopped_whatever_the_byte() {
    for cut in [0, 1, 4095, 65_536, 262_144, 262_145, 299_999] {
        let files_asked = AtomicUsize::new(0);
        let server = Server::with(weights_list(), move |request, stream| {
            let cut = match files_asked.fetch_add(1, Ordering::SeqCst) {
                0 => cut,
                _ => usize::MAX,
            };
            reply_part(request, stream, &weights(), cut);
        });
        fetched_in(&Sandbox::new(), &server);
        let ranges: Vec<_> = server.seen().iter().filter_map(|seen| seen.range).collect();
        assert_eq!(ranges, [(0, 299_999), (cut, 299_999)]);
    }
}

#[test]
fn what_a_killed_fetch_left_is_gone_on_with_and_checked() {
    let whole = weights();
    let mut damaged = whole[..5000].to_vec();
    damaged[17] ^= 1;
    let long = vec![7; whole.len() + 1];
    let cases: [(&[u8], &[usize]); 5] = [
        (&whole[..1], &[1]),
        (&whole[..299_999], &[299_999]),
        (&whole, &[]),
        // Found out at the end, and begun anew.
        (&damaged, &[5000, 0]),
        (&long, &[0]),
    ];
    for (left, asked) in cases {
        let sandbox = Sandbox::new();
        std::fs::create_dir(sandbox.part()).unwrap();
        let begun = sandbox.part().join("model.safetensors.incomplete");
        std::fs::write(begun, left).unwrap();
        let server = Server::with(weights_list(), honest);
        fetched_in(&sandbox, &server);
        let firsts: Vec<_> = server.seen().iter().filter_map(|r| r.range).collect();
        let firsts: Vec<_> = firsts.into_iter().map(|(first, _)| first).collect();
        assert_eq!(firsts, asked, "{} bytes were left", left.len());
    }
}

/// `main` moved on between two starts: names are the same, bytes are not.
#[test]
fn files_of_another_commit_do_not_stay() {
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.part()).unwrap();
    for name in [
        "model.safetensors",
        "model-00002-of-00002.safetensors",
        "old.json.incomplete",
    ] {
        std::fs::write(sandbox.part().join(name), vec![7; weights().len()]).unwrap();
    }
    fetched_in(&sandbox, &Server::with(weights_list(), honest));
    assert_eq!(std::fs::read_dir(sandbox.out()).unwrap().count(), 2);
}

#[test]
fn empty_file_is_a_file() {
    let siblings = [
        listed("model.safetensors", &weights()),
        json!({ "rfilename": "empty.txt", "size": 0, "blobId": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391" }),
    ];
    let sandbox = Sandbox::new();
    fetched_in(&sandbox, &Server::with(list(&siblings), honest));
    let empty = std::fs::read(sandbox.out().join("empty.txt")).unwrap();
    assert!(empty.is_empty());
}

#[test]
fn damaged_file_is_removed() {
    let server = Server::with(weights_list(), |request, stream| {
        let mut bytes = weights();
        bytes[1000] ^= 1;
        reply_part(request, stream, &bytes, usize::MAX);
    });
    let sandbox = Sandbox::new();
    refused_in(&sandbox, &server, "differs from its published hash");
    let left = std::fs::read_dir(sandbox.part()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

fn redirect(stream: &mut TcpStream, to: &str) {
    reply(stream, "302 Found", &[&format!("location: {to}")], b"");
}

#[test]
fn token_goes_to_no_other_host() {
    let cdn = Server::start(honest);
    let target = format!("{}/cdn/x", cdn.address);
    let server = Server::with(weights_list(), move |request, stream| {
        match request.path.starts_with("/moved/") {
            true => redirect(stream, &target),
            false => redirect(stream, &format!("/moved/{}", request.file())),
        }
    });
    let sandbox = Sandbox::new();
    fetch(&server.address, Some("secret"), "main", &sandbox.out()).unwrap();
    for seen in server.seen() {
        assert_eq!(seen.token.as_deref(), Some("Bearer secret"), "{seen:?}");
    }
    assert_eq!(server.seen().len(), 3);
    let away = cdn.seen();
    assert_eq!(away.len(), 1);
    assert_eq!(
        (away[0].token.clone(), away[0].range.is_some()),
        (None, true)
    );
    sandbox.check();
}

#[test]
fn redirects_that_lead_nowhere_are_refused() {
    for (location, reason) in [
        ("file:///etc/passwd", "no address"),
        ("ftp://127.0.0.1/x", "no address"),
        ("http://user:secret@127.0.0.1/x", "no address"),
        ("x", "no address"),
        ("", "no address"),
    ] {
        let server = Server::with(weights_list(), move |_, stream| redirect(stream, location));
        refused(&server, reason);
    }
    let server = Server::start(|request, stream| redirect(stream, &request.path));
    refused(&server, "redirects more than 10 times");
    assert_eq!(server.seen().len(), 11);
    let server = Server::start(|_, stream| reply(stream, "302 Found", &[], b""));
    refused(&server, "no address");
    let server = Server::start(|_, stream| redirect(stream, "/\u{1b}[2J"));
    refused(&server, "127.0.0.1");
}

#[test]
fn status_names_the_remedy() {
    for (status, reason) in [
        ("401 Unauthorized", "give a token"),
        ("403 Forbidden", "give a token"),
        ("404 Not Found", "check the name and the revision"),
        ("204 No Content", "status 204"),
        ("418 \u{1b}[2J", "127.0.0.1"),
    ] {
        let server = Server::start(move |_, stream| reply(stream, status, &[], b""));
        refused(&server, reason);
        assert_eq!(server.seen().len(), 1, "{status}");
    }
}

#[test]
fn busy_server_is_asked_again() {
    let asked = AtomicUsize::new(0);
    let server = Server::start(move |request, stream| {
        match (asked.fetch_add(1, Ordering::SeqCst) % 2, request.is_list()) {
            (0, _) => reply(stream, "503 Service Unavailable", &[], b""),
            (_, true) => reply(stream, "200 OK", &[], weights_list().to_string().as_bytes()),
            (_, false) => honest(request, stream),
        }
    });
    fetched_in(&Sandbox::new(), &server);
    assert_eq!(server.seen().len(), 4);
}

#[test]
fn two_fetches_into_one_folder_do_not_mix() {
    let sandbox = Sandbox::new();
    let out = sandbox.out();
    let asked = AtomicUsize::new(0);
    let server = Server::with(weights_list(), move |request, stream| {
        if asked.fetch_add(1, Ordering::SeqCst) == 0 {
            // While the first one waits for its bytes.
            let second = Server::with(weights_list(), honest);
            let error = second.fetch(&out).unwrap_err();
            assert!(matches!(error, Error::Busy { .. }), "{error}");
        }
        honest(request, stream);
    });
    fetched_in(&sandbox, &server);
    assert_eq!(server.seen().len(), 2);
    let error = server.fetch(&sandbox.out()).unwrap_err();
    assert!(matches!(error, Error::Exists { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn links_that_somebody_laid_are_not_followed() {
    use std::os::unix::fs::symlink;
    for name in ["model.safetensors.incomplete", ".lock"] {
        let sandbox = Sandbox::new();
        std::fs::create_dir(sandbox.part()).unwrap();
        symlink(sandbox.path("victim"), sandbox.part().join(name)).unwrap();
        let server = Server::with(weights_list(), honest);
        refused_in(&sandbox, &server, "something other than a file");
    }
    // One in the place of a whole file is replaced by the file.
    let sandbox = Sandbox::new();
    std::fs::create_dir(sandbox.part()).unwrap();
    let place = sandbox.part().join("model.safetensors");
    symlink(sandbox.path("victim"), place).unwrap();
    fetched_in(&sandbox, &Server::with(weights_list(), honest));

    let sandbox = Sandbox::new();
    let elsewhere = tempfile::tempdir().unwrap();
    symlink(elsewhere.path(), sandbox.part()).unwrap();
    let error = Server::with(weights_list(), honest)
        .fetch(&sandbox.out())
        .unwrap_err();
    assert!(matches!(error, Error::Part { .. }), "{error}");
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}
