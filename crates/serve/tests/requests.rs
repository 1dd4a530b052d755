//! What requests of real clients ask for: honoured to the token, taken for what it means, or refused by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use common::{Answer, Server, hello, post, setup, with};
use engine::EngineConfig;
use serde_json::{Value, json};

/// A server whose conversations begin with the user, as the cases' own do.
fn plain_server() -> Server {
    let mut setup = setup();
    setup.persona = text::Persona::default();
    Server::with(setup, EngineConfig::default())
}

fn greedy(messages: Value) -> Value {
    json!({"messages": messages, "max_tokens": 6, "temperature": 0, "top_p": 1, "presence_penalty": 0})
}

/// Ids of plain text: a model of random weights would else say special tokens, which only completions may.
fn text_ids(server: &Server) -> Vec<u32> {
    let tokenizer = server.state.setup().chat.tokenizer();
    (0..tokenizer.vocab_size() as u32)
        .filter(|id| !tokenizer.is_added(*id))
        .collect()
}

fn error_of(answer: &Answer) -> (StatusCode, String, String) {
    let error = answer.json()["error"].clone();
    let text = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
    (answer.status, text("param"), text("message"))
}

#[tokio::test]
async fn continuing_the_last_message_gives_what_the_same_prompt_by_hand_gives() {
    let server = plain_server();
    let allowed = json!({"allowed_token_ids": text_ids(&server)});
    let by_hand = json!({
        "prompt": "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe boat is",
        "max_tokens": 6, "temperature": 0, "top_p": 1, "presence_penalty": 0,
    });
    let by_hand = server
        .post("/v1/completions", &with(&by_hand, allowed.clone()))
        .await
        .json();
    let messages = json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "The boat is"}]);
    let prefixed = json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "The boat is", "prefix": true}]);
    let bodies = [
        with(
            &greedy(messages.clone()),
            json!({"continue_final_message": true, "add_generation_prompt": false}),
        ),
        with(
            &greedy(messages.clone()),
            json!({"continue_final_message": true}),
        ),
        with(&greedy(messages.clone()), json!({"continue_": true})),
        greedy(prefixed),
    ];
    for body in bodies {
        let answer = server.chat(with(&body, allowed.clone())).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(answer.content(), by_hand["choices"][0]["text"], "{body}");
        assert_eq!(
            answer.json()["usage"]["prompt_tokens"],
            by_hand["usage"]["prompt_tokens"]
        );
    }
    let anew = server.chat(with(&greedy(messages), allowed)).await.json();
    assert_ne!(
        anew["usage"]["prompt_tokens"],
        by_hand["usage"]["prompt_tokens"]
    );
}

#[tokio::test]
async fn continuing_needs_an_answer_and_no_second_beginning() {
    let server = plain_server();
    let user = json!([{"role": "user", "content": "Hi."}]);
    let answered =
        json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "The"}]);
    for (messages, more, param) in [
        (
            &answered,
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
        (
            &user,
            json!({"continue_final_message": true, "add_generation_prompt": false}),
            "messages[0].role",
        ),
        (&user, json!({"continue_": true}), "messages[0].role"),
        (
            &user,
            json!({"add_generation_prompt": false}),
            "add_generation_prompt",
        ),
    ] {
        let (status, got, message) =
            error_of(&server.chat(with(&greedy(messages.clone()), more)).await);
        assert_eq!(
            (status, got.as_str()),
            (StatusCode::BAD_REQUEST, param),
            "{message}"
        );
    }
    let prefixed = json!([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "The", "prefix": true}]);
    for (messages, more, names) in [
        (
            &answered,
            json!({"continue_final_message": false, "continue_": true}),
            ["continue_", "continue_final_message"],
        ),
        (
            &prefixed,
            json!({"continue_final_message": false}),
            ["messages[1].prefix", "continue_final_message"],
        ),
        (
            &user,
            json!({"chat_template_kwargs": {"enable_thinking": false}, "enable_thinking": true}),
            ["chat_template_kwargs.enable_thinking", "enable_thinking"],
        ),
    ] {
        let (status, param, message) =
            error_of(&server.chat(with(&greedy(messages.clone()), more)).await);
        assert_eq!(
            (status, param.as_str()),
            (StatusCode::BAD_REQUEST, names[0]),
            "{message}"
        );
        let other = format!("another name of `{}`", names[1]);
        assert!(message.contains(&other), "{message}");
    }
    let ordinary = with(
        &greedy(user),
        json!({"continue_final_message": false, "add_generation_prompt": true}),
    );
    assert_eq!(server.chat(ordinary).await.status, StatusCode::OK);
}

#[tokio::test]
async fn forms_that_cannot_be_kept_are_refused_by_name_at_both_addresses() {
    let server = Server::new();
    for (field, value) in [
        ("guided_choice", json!(["yes", "no"])),
        ("guided_regex", json!("yes|no")),
        ("structured_outputs", json!({"choice": ["yes", "no"]})),
        ("grammar", json!("root ::= \"yes\" | \"no\"")),
        ("json_schema", json!({"type": "object"})),
        ("mirostat", json!(2)),
        ("typical_p", json!(0.9)),
        ("xtc_probability", json!(0.5)),
        ("dry_multiplier", json!(0.8)),
        ("use_beam_search", json!(true)),
        ("temprature", json!(0.1)),
    ] {
        let chat = server.chat(with(&hello(5), json!({ field: value }))).await;
        let text = with(
            &json!({"prompt": "Hi", "max_tokens": 4}),
            json!({ field: value }),
        );
        let text = server.post("/v1/completions", &text).await;
        for answer in [chat, text] {
            let (status, param, message) = error_of(&answer);
            assert_eq!(
                (status, param.as_str()),
                (StatusCode::BAD_REQUEST, field),
                "{message}"
            );
            assert!(message.contains(field), "{message}");
        }
    }
    let format = json!({"response_format": {"type": "json_object"}});
    let (status, param, _) = error_of(&server.chat(with(&hello(5), format)).await);
    assert_eq!(
        (status, param.as_str()),
        (StatusCode::BAD_REQUEST, "response_format.type")
    );
}

#[tokio::test]
async fn keys_of_messages_that_mean_nothing_here_are_refused_and_names_are_not() {
    let server = Server::new();
    let message = |key: &str, value: Value| json!({"messages": [{"role": "user", "content": "Hi.", key: value}, {"role": "user", "content": "You?"}]});
    for (key, value) in [
        ("reasoning", json!("Hm.")),
        ("reasoning_content", json!("Hm.")),
        ("refusal", json!("No.")),
        ("annotations", json!([{"type": "url_citation"}])),
        ("prefix", json!(true)),
        ("tool_calls", json!([{"id": "a"}])),
        ("mood", json!("sad")),
    ] {
        let (status, param, _) = error_of(&server.chat(with(&hello(5), message(key, value))).await);
        assert_eq!(
            (status, param),
            (StatusCode::BAD_REQUEST, format!("messages[0].{key}"))
        );
    }
    for (key, value) in [
        ("name", json!("Ann")),
        ("tool_calls", json!([])),
        ("tool_call_id", json!("call-1")),
        ("prefix", json!(false)),
        ("refusal", Value::Null),
        ("annotations", json!([])),
        ("mood", Value::Null),
    ] {
        let answer = server.chat(with(&hello(5), message(key, value))).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    }
}

#[tokio::test]
async fn content_that_is_null_or_absent_is_the_empty_string() {
    let server = plain_server();
    let mut replies = Vec::new();
    for answer in [
        json!({"role": "assistant", "content": ""}),
        json!({"role": "assistant", "content": null}),
        json!({"role": "assistant"}),
    ] {
        let user = json!({"role": "user", "content": "Hi."});
        let reply = server.chat(greedy(json!([user, answer, user]))).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        replies.push((
            reply.content(),
            reply.json()["usage"]["prompt_tokens"].clone(),
        ));
    }
    assert!(
        replies.iter().all(|reply| *reply == replies[0]),
        "{replies:?}"
    );
}

#[tokio::test]
async fn sentinels_and_whole_floats_are_taken_for_what_they_mean() {
    let config = EngineConfig {
        context: 300,
        ..EngineConfig::default()
    };
    let server = Server::with(setup(), config);
    for more in [
        json!({"seed": -1}),
        json!({"seed": null}),
        json!({"stop": ["", "\nUser:"]}),
        json!({"stop": colons()}),
        json!({"temperature": null, "top_p": null, "stop": null, "logit_bias": null, "tools": null}),
    ] {
        let answer = server.chat(with(&hello(4), more)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    }
    let whole = server
        .chat(with(&hello(8), json!({"seed": 42.0})))
        .await
        .content();
    assert_eq!(
        server
            .chat(with(&hello(8), json!({"seed": 42})))
            .await
            .content(),
        whole
    );
    let answer = server
        .chat(with(&hello(4), json!({"max_tokens": -1})))
        .await
        .json();
    assert_eq!(answer["usage"]["total_tokens"], 300);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

/// Seventeen stop strings, as the reported request has them.
fn colons() -> Vec<String> {
    ('A'..='Q').map(|letter| format!("\n{letter}:")).collect()
}

#[tokio::test]
async fn everything_that_a_role_play_front_end_sends_by_default_is_taken() {
    let server = Server::new();
    let body = json!({
        "prompt": "Ann: Hi.\nMira:", "model": "tiny", "max_new_tokens": 8, "max_tokens": 8, "temperature": 0.7,
        "top_p": 0.9, "typical_p": 1, "typical": 1, "min_p": 0.05, "repetition_penalty": 1.1, "frequency_penalty": 0,
        "presence_penalty": 0, "top_k": 40, "skew": 0, "min_tokens": 0, "add_bos_token": true, "smoothing_factor": 0,
        "smoothing_curve": 1, "dry_allowed_length": 2, "dry_multiplier": 0, "dry_base": 1.75,
        "dry_sequence_breakers": "[\"\\n\", \":\"]", "dry_penalty_last_n": 0, "max_tokens_second": 0,
        "stopping_strings": ["\nAnn:"], "stop": ["\nAnn:"], "truncation_length": 8192, "ban_eos_token": false,
        "skip_special_tokens": true, "include_reasoning": true
    });
    let more = json!({
        "top_a": 0, "tfs": 1, "mirostat_mode": 0,
        "mirostat_tau": 5, "mirostat_eta": 0.1, "custom_token_bans": "", "banned_strings": [], "api_type": "vllm",
        "api_server": "http://localhost:8000", "xtc_threshold": 0.1, "xtc_probability": 0, "nsigma": 0, "top_n_sigma": 0,
        "min_keep": 0, "adaptive_target": -0.01, "adaptive_decay": 0.9, "rep_pen": 1.1, "rep_pen_range": 0,
        "repetition_penalty_range": 0, "guidance_scale": 1, "negative_prompt": "", "repeat_penalty": 1.1,
        "repeat_last_n": 0, "n_predict": 8, "num_predict": 8, "num_ctx": 8192, "mirostat": 0, "ignore_eos": false,
        "rep_pen_slope": 1, "n": 1, "spaces_between_special_tokens": true, "stream": false, "seed": -1,
    });
    let body = with(&body, more);
    let answer = server.post("/v1/completions", &body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    let differing = with(&body, json!({"n_predict": 9}));
    let (status, param, _) = error_of(&server.post("/v1/completions", &differing).await);
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        ["n_predict", "max_new_tokens"].contains(&param.as_str()),
        "{param}"
    );
}

#[tokio::test]
async fn least_length_holds_back_stop_strings_and_the_end() {
    let server = Server::new();
    let free = server.chat(hello(40)).await.content();
    let stop: String = free.chars().take(1).collect();
    let stopped = server.chat(with(&hello(40), json!({ "stop": stop }))).await;
    assert_eq!(stopped.content(), "");
    let late = server
        .chat(with(&hello(40), json!({"stop": stop, "min_tokens": 10})))
        .await
        .json();
    assert!(
        late["usage"]["completion_tokens"].as_u64().unwrap() >= 10,
        "{late}"
    );

    let end = server.state.setup().chat.tokenizer().eos();
    let eager = json!({"ignore_eos": false, "logit_bias": {end.to_string(): 100}});
    let ended = server.chat(with(&hello(40), eager.clone())).await.json();
    assert_eq!(
        (
            &ended["choices"][0]["finish_reason"],
            &ended["usage"]["completion_tokens"]
        ),
        (&json!("stop"), &json!(1))
    );
    let patient = with(&hello(40), with(&eager, json!({"min_tokens": 5})));
    let ended = server.chat(patient).await.json();
    assert_eq!(ended["usage"]["completion_tokens"], 6);
    let (status, param, _) =
        error_of(&server.chat(with(&hello(4), json!({"min_tokens": 5}))).await);
    assert_eq!(
        (status, param.as_str()),
        (StatusCode::BAD_REQUEST, "min_tokens")
    );
}

#[tokio::test]
async fn what_stopped_the_reply_may_stay_in_it() {
    let server = Server::new();
    let free = server.chat(hello(40)).await.content();
    let stop: String = free.chars().skip(3).take(2).collect();
    let end = free.find(&stop).unwrap() + stop.len();
    let body = with(
        &hello(40),
        json!({"stop": stop, "include_stop_str_in_output": true}),
    );
    assert_eq!(server.chat(body.clone()).await.content(), free[..end]);
    let streamed = server.chat(with(&body, json!({"stream": true}))).await;
    assert_eq!(streamed.streamed_text(0), free[..end]);
}

#[tokio::test]
async fn biases_bans_and_allowed_ids_decide_what_is_said() {
    let server = Server::new();
    let tokenizer = server.state.setup().chat.tokenizer();
    let id = tokenizer.encode("a").unwrap()[0];
    let said = async |more: Value| {
        let answer = server.chat(with(&hello(6), more)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.content()
    };
    assert_eq!(
        said(json!({"logit_bias": {id.to_string(): 100}})).await,
        "aaaaaa"
    );
    assert_eq!(said(json!({"logit_bias": [[id, 100.0]]})).await, "aaaaaa");
    assert_eq!(said(json!({"allowed_token_ids": [id]})).await, "aaaaaa");
    let twice = json!({"allowed_token_ids": [id, id + 1], "bad_words": ["aa"], "logit_bias": {id.to_string(): 100}});
    assert_eq!(
        tokenizer.encode("aa").unwrap(),
        [id, id],
        "the word to ban is two tokens"
    );
    assert!(!said(twice).await.contains("aa"));
    let strange = json!({"allowed_token_ids": [99_999_999]});
    let (status, param, _) = error_of(&server.chat(with(&hello(6), strange)).await);
    assert_eq!(
        (status, param.as_str()),
        (StatusCode::BAD_REQUEST, "allowed_token_ids")
    );
    let nothing = with(
        &hello(6),
        json!({"allowed_token_ids": [id], "logit_bias": [[id, false]]}),
    );
    assert_eq!(server.chat(nothing).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn headers_and_addresses_are_read_as_the_standards_have_them() {
    let mut setup = setup();
    setup.api_keys = vec!["key".to_owned()];
    let server = Server::with(setup, EngineConfig::default());
    let send = async |path: &str, content_type: &str, key: &str| {
        let request = Request::post(path)
            .header(header::CONTENT_TYPE, content_type)
            .header(header::AUTHORIZATION, key)
            .body(Body::from(format!("\u{feff}{}", hello(3))))
            .unwrap();
        server.send(request).await.status
    };
    for content_type in [
        "application/json",
        "Application/JSON; Charset=\"UTF-8\"",
        "application/vnd.api+json",
    ] {
        assert_eq!(
            send("/v1/chat/completions", content_type, "Bearer key").await,
            StatusCode::OK,
            "{content_type}"
        );
    }
    for content_type in [
        "application/jsonp",
        "text/plain; application/json",
        "multipart/form-data",
    ] {
        assert_eq!(
            send("/v1/chat/completions", content_type, "Bearer key").await,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "{content_type}"
        );
    }
    for key in ["bearer key", "BEARER  key"] {
        assert_eq!(
            send("/v1/chat/completions", "application/json", key).await,
            StatusCode::OK,
            "{key}"
        );
    }
    for key in ["Basic key", "key", "Bearerkey", "bearer KEY"] {
        assert_eq!(
            send("/v1/chat/completions", "application/json", key).await,
            StatusCode::UNAUTHORIZED,
            "{key}"
        );
    }
    for path in [
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1/v1/chat/completions",
        "/chat/completions",
    ] {
        assert_eq!(
            send(path, "application/json", "Bearer key").await,
            StatusCode::OK,
            "{path}"
        );
    }
}

#[tokio::test]
async fn head_asks_what_get_asks_without_the_body() {
    let server = Server::new();
    for path in ["/health", "/v1/models", "/models/", "/chat"] {
        let head = server
            .send(Request::head(path).body(Body::empty()).unwrap())
            .await;
        assert_eq!(
            (head.status, head.text.as_str()),
            (StatusCode::OK, ""),
            "{path}"
        );
    }
}

#[tokio::test]
async fn replies_are_the_same_alone_and_beside_requests_of_every_kind() {
    let server = Server::new();
    let body = with(&hello(40), json!({"temperature": 0, "presence_penalty": 0}));
    let alone = server.chat(body.clone()).await.content();
    let others = [
        ("/v1/completions", json!({"prompt": ["The lamp", "Nobody came home"], "echo": true, "logprobs": 2, "max_tokens": 30})),
        ("/v1/completions", json!({"prompt": "The lighthouse keeper counted", "max_tokens": 0, "echo": true, "logprobs": 1})),
        ("/v1/chat/completions", with(&hello(60), json!({"repetition_penalty": 1.3, "min_tokens": 50, "bad_words": ["the"]}))),
    ]
    .map(|(path, body)| tokio::spawn(tower::ServiceExt::oneshot(server.app.clone(), post(path, &body))));
    assert_eq!(server.chat(body).await.content(), alone);
    for other in others {
        assert_eq!(other.await.unwrap().unwrap().status(), StatusCode::OK);
    }
}
