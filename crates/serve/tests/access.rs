//! Over a real socket: who may ask, by the name that is asked for and by key.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Server, ask, setup};
use engine::EngineConfig;
use serve::{AllowedHosts, ConnectionLimits, GuessLimits};

#[tokio::test]
async fn only_names_of_this_machine_are_answered() {
    let mut setup = setup();
    setup.allowed_hosts = AllowedHosts::this_machine_and(&["cyrene.lan".to_owned()]).unwrap();
    let server = Server::with(setup, EngineConfig::default());
    let address = server.listen(ConnectionLimits::default()).await;
    let cases: &[(&[&str], u16)] = &[
        (&["localhost"], 200),
        (&["localhost:8000"], 200),
        (&["127.0.0.1"], 200),
        (&["127.0.0.1:1"], 200),
        (&["[::1]:8000"], 200),
        (&["LocalHost"], 200),
        (&["cyrene.lan:8000"], 200),
        (&["evil.example"], 403),
        (&["evil.example:8000"], 403),
        (&["localhost.evil.example"], 403),
        (&["127.0.0.1.evil.example"], 403),
        (&["192.0.2.1"], 200),
        (&["cyrene.localhost:8000"], 200),
        (&[""], 403),
        (&[], 403),
        (&["localhost", "evil.example"], 403),
    ];
    for (hosts, expect) in cases {
        let hosts: String = hosts
            .iter()
            .map(|host| format!("host: {host}\r\n"))
            .collect();
        for path in ["/health", "/chat", "/v1/models"] {
            let head = format!("GET {path} HTTP/1.1\r\n{hosts}");
            let (status, _, body) = ask(address, &head, "").await;
            assert_eq!(status, *expect, "{path} {hosts:?}: {body}");
            if status == 403 {
                assert!(body.contains("--allow-host"), "{body}");
            }
        }
    }
    // The first line can name a host too.
    for (asked, expect) in [("localhost", 200), ("evil.example", 403)] {
        let head = format!("GET http://{asked}/health HTTP/1.1\r\nhost: localhost\r\n");
        assert_eq!(ask(address, &head, "").await.0, expect, "{asked}");
    }
}

#[tokio::test]
async fn address_that_guesses_keys_is_slowed_down() {
    const MODELS: &str = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\n";
    let with_limits = async |guesses: GuessLimits| {
        let mut setup = setup();
        setup.api_keys = vec!["right".to_owned()];
        setup.limits.guesses = guesses;
        let server = Server::with(setup, EngineConfig::default());
        server.listen(ConnectionLimits::default()).await
    };
    let status = async |address: SocketAddr, key: &str| {
        let head = format!("{MODELS}authorization: Bearer {key}\r\n");
        let (status, _, body) = ask(address, &head, "").await;
        (status, body)
    };

    // No request may wait here, so that the test does not either.
    let address = with_limits(GuessLimits {
        free: 1,
        first_wait: Duration::from_secs(3600),
        most_wait: Duration::from_secs(3600),
        waiting: 0,
        ..GuessLimits::default()
    })
    .await;
    assert_eq!(status(address, "right").await.0, 200);
    assert_eq!(ask(address, MODELS, "").await.0, 401);
    for _ in 0..2 {
        assert_eq!(status(address, "wrong").await.0, 401);
    }
    // From here on nothing is told sooner for a right key than for a wrong one.
    for key in ["wrong", "right"] {
        let (status, body) = status(address, key).await;
        assert_eq!(status, 429, "{key}");
        assert!(body.contains("too_many_wrong_keys"), "{body}");
    }
    // What needs no key is as it was, and so is who sends none.
    let health = "GET /health HTTP/1.1\r\nhost: localhost\r\n";
    assert_eq!(ask(address, health, "").await.0, 200);
    assert_eq!(ask(address, MODELS, "").await.0, 401);

    // A wait that is over ends in an answer.
    let address = with_limits(GuessLimits {
        free: 0,
        first_wait: Duration::from_millis(1),
        most_wait: Duration::from_millis(4),
        ..GuessLimits::default()
    })
    .await;
    for _ in 0..5 {
        assert_eq!(status(address, "wrong").await.0, 401);
    }
    assert_eq!(status(address, "right").await.0, 200);
}
