//! `/v1/chat/completions` as a client sees it.

mod common;

use axum::http::{StatusCode, header};
use common::{MODEL, Server, hello, setup, with};
use engine::EngineConfig;
use serde_json::{Value, json};

#[tokio::test]
async fn whole_reply_has_openais_shape() {
    let server = Server::new();
    let answer = server.chat(hello(12)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let json = answer.json();
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(json["model"], MODEL);
    assert!(json["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert!(json["created"].is_u64());
    let choice = &json["choices"][0];
    assert_eq!(choice["index"], 0);
    assert_eq!(choice["message"]["role"], "assistant");
    assert!(choice["message"]["content"].is_string());
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["logprobs"], Value::Null);
    let usage = &json["usage"];
    assert_eq!(usage["completion_tokens"], 12);
    let total = usage["prompt_tokens"].as_u64().unwrap() + 12;
    assert_eq!(usage["total_tokens"], total);
}

#[tokio::test]
async fn stream_is_framed_and_says_what_the_whole_reply_says() {
    let server = Server::new();
    let whole = server.chat(hello(40)).await.content();
    let body = with(
        &hello(40),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    let answer = server.chat(body).await;
    let content_type = answer.headers[header::CONTENT_TYPE].to_str().unwrap();
    assert!(content_type.starts_with("text/event-stream"));
    assert!(answer.text.ends_with("data: [DONE]\n\n"));

    let chunks = answer.chunks();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let ids: Vec<&Value> = chunks.iter().map(|chunk| &chunk["id"]).collect();
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert!(
        chunks
            .iter()
            .all(|c| c["object"] == "chat.completion.chunk")
    );
    let finishes: Vec<&Value> = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"].get(0))
        .map(|choice| &choice["finish_reason"])
        .filter(|finish| !finish.is_null())
        .collect();
    assert_eq!(finishes, ["length"]);
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], 40);
    assert_eq!(answer.streamed_text(0), whole);
}

#[tokio::test]
async fn seed_repeats_the_reply_also_under_load() {
    let server = Server::new();
    let alone = server.chat(hello(60)).await.content();
    let load: Vec<_> = (0..5)
        .map(|n| {
            let body = with(
                &hello(120),
                json!({"seed": n, "messages": [{"role": "user", "content": format!("boat {n}")}]}),
            );
            let app = server.app.clone();
            tokio::spawn(tower::ServiceExt::oneshot(
                app,
                common::post("/v1/chat/completions", &body),
            ))
        })
        .collect();
    let beside = server.chat(hello(60)).await.content();
    assert_eq!(alone, beside);
    for request in load {
        assert_eq!(request.await.unwrap().unwrap().status(), StatusCode::OK);
    }
    let other = server.chat(with(&hello(60), json!({"seed": 18}))).await;
    assert_ne!(alone, other.content());
}

#[tokio::test]
async fn stop_string_across_token_borders_ends_the_reply() {
    let server = Server::new();
    let body = with(&hello(60), json!({"logprobs": true}));
    let full = server.chat(body).await;
    let text = full.content();
    // The end of one token's text and the beginning of the next one's, where both are plain letters.
    let json = full.json();
    let tokens = json["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let spelt: Vec<&str> = tokens
        .iter()
        .map(|t| t["token"].as_str().unwrap())
        .collect();
    let stop = spelt
        .windows(2)
        .skip(5)
        .find_map(|pair| {
            let (end, begin) = (pair[0].chars().next_back()?, pair[1].chars().next()?);
            let is_plain = |c: char| c.is_ascii_graphic();
            (is_plain(end) && is_plain(begin)).then(|| format!("{end}{begin}"))
        })
        .unwrap();

    let expected = text.split(&stop).next().unwrap();
    let stopped = with(&hello(60), json!({"stop": stop}));
    let whole = server.chat(stopped.clone()).await;
    assert_eq!(whole.content(), expected);
    assert_eq!(whole.json()["choices"][0]["finish_reason"], "stop");
    let body = with(
        &stopped,
        json!({"stream": true, "stop": [stop, "never said"]}),
    );
    let streamed = server.chat(body).await;
    assert_eq!(streamed.streamed_text(0), expected);
}

#[tokio::test]
async fn logprobs_have_openais_shape() {
    let server = Server::new();
    let body = with(&hello(30), json!({"logprobs": true, "top_logprobs": 3}));
    let answer = server.chat(body.clone()).await;
    let json = answer.json();
    let tokens = json["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(tokens.len(), 30);
    let mut bytes: Vec<u8> = Vec::new();
    for token in tokens {
        let logprob = token["logprob"].as_f64().unwrap();
        assert!(logprob <= 0.0);
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert!(top[0]["logprob"].as_f64().unwrap() >= logprob);
        assert!(top[0]["token"].is_string() && top[0]["bytes"].is_array());
        let token_bytes = token["bytes"].as_array().unwrap();
        bytes.extend(token_bytes.iter().map(|b| b.as_u64().unwrap() as u8));
    }
    let plain = String::from_utf8_lossy(&bytes);
    // Special tokens have bytes but no text.
    if !plain.contains("<|") {
        assert_eq!(plain, answer.content());
    }

    let streamed = server.chat(with(&body, json!({"stream": true}))).await;
    let n_streamed: usize = streamed
        .chunks()
        .iter()
        .filter_map(|chunk| {
            chunk["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
        })
        .map(|content| content.len())
        .sum();
    assert_eq!(n_streamed, 30);
}

#[tokio::test]
async fn line_events_carry_text_perplexity_and_tokens() {
    let server = Server::new();
    let body = with(&hello(400), json!({"stream": true, "cyrene_lines": true}));
    let answer = server.chat(body).await;
    let lines: Vec<Value> = answer
        .events()
        .into_iter()
        .filter(|(name, _)| name == "line")
        .map(|(_, data)| serde_json::from_str(&data).unwrap())
        .collect();
    let expected: Vec<String> = answer
        .streamed_text(0)
        .split('\n')
        .map(|line| line.trim_end().to_owned())
        .filter(|line| !line.trim().is_empty())
        .collect();
    let texts: Vec<&str> = lines.iter().map(|l| l["text"].as_str().unwrap()).collect();
    assert_eq!(texts, expected);
    assert!(
        lines
            .iter()
            .all(|line| line["ppl"].as_f64().unwrap() >= 1.0)
    );
    assert!(
        lines
            .iter()
            .all(|line| line["tokens"].as_u64().unwrap() >= 1)
    );

    let plain = server
        .chat(with(&hello(400), json!({"stream": true})))
        .await;
    assert!(plain.events().iter().all(|(name, _)| name == "message"));
}

#[tokio::test]
async fn several_replies_come_with_their_indices() {
    let server = Server::new();
    let answer = server.chat(with(&hello(20), json!({"n": 3}))).await.json();
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_ne!(choices[0]["message"], choices[1]["message"]);
    assert_eq!(answer["usage"]["completion_tokens"], 60);

    let body = with(&hello(20), json!({"n": 3, "stream": true}));
    let streamed = server.chat(body).await;
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(
            streamed.streamed_text(index as u64),
            choice["message"]["content"].as_str().unwrap()
        );
    }
}

#[tokio::test]
async fn next_turn_reuses_the_last_ones_work() {
    let server = Server::new();
    let reply = server.chat(hello(20)).await.content();
    let body = with(
        &hello(5),
        json!({"messages": [
            {"role": "user", "content": "Who is there?"},
            {"role": "assistant", "content": reply},
            {"role": "user", "content": "And who else?"},
        ]}),
    );
    let usage = server.chat(body).await.json()["usage"].clone();
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached.unwrap() > 10, "{usage}");
}

#[tokio::test]
async fn profile_decides_what_the_request_leaves_open() {
    let mut setup = setup();
    setup.profiles = serve::Profiles::parse(
        "active = \"Cold\"\n\
         [[profile]]\nname = \"Cold\"\ntemperature = 0.0\ntop_p = 1.0\ntop_k = 0\npresence_penalty = 0.0\n\
         [[profile]]\nname = \"Hot\"\ntemperature = 5.0\ntop_p = 1.0\ntop_k = 0\npresence_penalty = 0.0\n",
    )
    .unwrap();
    let server = Server::with(setup, EngineConfig::default());
    let open = |more: Value| {
        with(
            &json!({"messages": [{"role": "user", "content": "Who?"}], "ignore_eos": true, "max_tokens": 30}),
            more,
        )
    };
    let first = server.chat(open(json!({"seed": 1}))).await.content();
    let second = server.chat(open(json!({"seed": 2}))).await.content();
    assert_eq!(first, second, "greedy needs no seed");
    let hot = server
        .chat(open(json!({"seed": 1, "profile": "hot"})))
        .await;
    assert_ne!(hot.content(), first);
    let own = server
        .chat(open(json!({"seed": 1, "profile": "hot", "temperature": 0})))
        .await;
    assert_eq!(own.content(), first);
}

#[tokio::test]
async fn bad_requests_are_refused_with_the_field_named() {
    let server = Server::new();
    let cases: [(Value, &str, &str); 18] = [
        (json!({"messages": "hi"}), "invalid_value", "messages"),
        (json!({"messages": []}), "invalid_value", "messages"),
        (
            json!({"messages": [{"role": "ghost", "content": "x"}]}),
            "invalid_value",
            "messages[0].role",
        ),
        (
            json!({"messages": [{"role": "user", "content": 3}]}),
            "invalid_value",
            "messages[0].content",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "invalid_value",
            "messages[0].content[0].type",
        ),
        (
            json!({"temperature": "hot"}),
            "invalid_value",
            "temperature",
        ),
        (json!({"temperature": -1}), "invalid_value", "temperature"),
        (json!({"top_p": 0}), "invalid_value", "top_p"),
        (json!({"n": 9}), "invalid_value", "n"),
        (json!({"n": 0}), "invalid_value", "n"),
        (json!({"max_tokens": 0}), "invalid_value", "max_tokens"),
        (json!({"top_logprobs": 3}), "invalid_value", "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 21}),
            "invalid_value",
            "top_logprobs",
        ),
        (json!({"stop": [5]}), "invalid_value", "stop"),
        (json!({"seed": 1.5}), "invalid_value", "seed"),
        (json!({"profile": "Wild"}), "invalid_value", "profile"),
        (
            json!({"logit_bias": {"the": 100}}),
            "invalid_value",
            "logit_bias",
        ),
        (
            json!({"chat_template_kwargs": {"enable_thinking": "yes"}}),
            "invalid_value",
            "chat_template_kwargs.enable_thinking",
        ),
    ];
    for (more, code, param) in cases {
        let answer = server.chat(with(&hello(5), more.clone())).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{more}");
        let error = &answer.json()["error"];
        assert_eq!(error["code"], code, "{more}");
        assert_eq!(error["param"], param, "{more}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(
            error["message"].as_str().unwrap().contains(param),
            "{error}"
        );
    }
}

#[tokio::test]
async fn unknown_model_is_not_found() {
    let server = Server::new();
    let answer = server
        .chat(with(&hello(5), json!({"model": "gpt-9"})))
        .await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    let error = &answer.json()["error"];
    assert_eq!(error["code"], "model_not_found");
    assert!(error["message"].as_str().unwrap().contains(MODEL));
}

#[tokio::test]
async fn prompt_beyond_the_context_is_refused() {
    let config = EngineConfig {
        context: 64,
        ..EngineConfig::default()
    };
    let server = Server::with(setup(), config);
    let long = "boats and boats and ".repeat(50);
    let body = json!({"messages": [{"role": "user", "content": long}]});
    let chat = server.chat(body).await;
    let body = json!({ "prompt": long });
    let text = server.post("/v1/completions", &body).await;
    for (answer, field) in [(chat, "messages"), (text, "prompt")] {
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], "context_length_exceeded");
        assert_eq!(error["param"], field);
    }
}

#[tokio::test]
async fn full_queue_asks_to_come_back() {
    let config = EngineConfig {
        max_waiting: 0,
        ..EngineConfig::default()
    };
    let server = Server::with(setup(), config);
    let answer = server.chat(hello(5)).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(answer.headers.contains_key(header::RETRY_AFTER));
    assert_eq!(answer.json()["error"]["code"], "queue_full");
}
