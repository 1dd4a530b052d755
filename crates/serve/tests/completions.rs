//! `/v1/completions` as measuring tools use it: lists of prompts, prompts that come back, and how likely they were.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use axum::http::StatusCode;
use common::{Server, setup, with};
use engine::EngineConfig;
use serde_json::{Value, json};

/// Two sums of f32 products in another order.
const TOLERANCE: f64 = 1e-4;

fn body(prompt: Value) -> Value {
    json!({"prompt": prompt, "seed": 4, "temperature": 1.0, "top_k": 0, "ignore_eos": true, "max_tokens": 12})
}

async fn complete(server: &Server, body: &Value) -> Value {
    let answer = server.post("/v1/completions", body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    answer.json()
}

fn ids(server: &Server, text: &str) -> Vec<u32> {
    server.state.setup().chat.tokenizer().encode(text).unwrap()
}

fn numbers(list: &Value) -> Vec<Option<f64>> {
    list.as_array().unwrap().iter().map(Value::as_f64).collect()
}

#[tokio::test]
async fn prompts_in_a_list_get_what_each_gets_alone_in_order() {
    let server = Server::new();
    let prompts = ["The lamp", "Who is there?", "Nobody"];
    let mut alone = Vec::new();
    let mut n_prompt = 0;
    for prompt in prompts {
        let answer = complete(&server, &with(&body(json!(prompt)), json!({"n": 2}))).await;
        n_prompt += answer["usage"]["prompt_tokens"].as_u64().unwrap();
        alone.extend(answer["choices"].as_array().unwrap().clone());
    }
    let id_lists: Vec<Vec<u32>> = prompts.iter().map(|prompt| ids(&server, prompt)).collect();
    for list in [json!(prompts), json!(id_lists)] {
        let together = complete(&server, &with(&body(list.clone()), json!({"n": 2}))).await;
        let choices = together["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 6);
        for (index, (choice, alone)) in choices.iter().zip(&alone).enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], alone["text"], "{index}");
        }
        assert_eq!(together["usage"]["prompt_tokens"], n_prompt);
        assert_eq!(together["usage"]["completion_tokens"], 6 * 12);

        let streamed = with(&body(list), json!({"n": 2, "stream": true}));
        let streamed = server.post("/v1/completions", &streamed).await;
        let mut texts = vec![String::new(); 6];
        for chunk in streamed.chunks() {
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().unwrap() as usize;
            texts[index].push_str(choice["text"].as_str().unwrap());
        }
        for (text, alone) in texts.iter().zip(&alone) {
            assert_eq!(text, alone["text"].as_str().unwrap());
        }
    }
}

#[tokio::test]
async fn lists_longer_than_the_queue_are_answered_all_the_same() {
    let config = EngineConfig {
        max_sequences: 2,
        max_waiting: 3,
        ..EngineConfig::default()
    };
    let server = Server::with(setup(), config);
    let prompts: Vec<String> = (0..40).map(|n| format!("Boat {n}")).collect();
    let answer = complete(&server, &body(json!(prompts))).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 40);
    assert_eq!(answer["usage"]["completion_tokens"], 40 * 12);
    let refused = server.stats().refused;
    assert_eq!(refused, 0, "those that wait their turn are not turned away");
}

#[tokio::test]
async fn prompts_that_are_none_are_refused() {
    let server = Server::new();
    for (prompt, code) in [
        (json!([]), "empty_prompt"),
        (json!([[]]), "empty_prompt"),
        (json!(["The lamp", ""]), "empty_prompt"),
        (json!(["The lamp", 5]), "invalid_value"),
        (json!([[1], [1.5]]), "invalid_value"),
        (json!({"text": "The lamp"}), "invalid_value"),
        (json!(vec!["a"; 257]), "invalid_value"),
        (json!([[1], [99_999_999]]), "invalid_token_id"),
    ] {
        let answer = server.post("/v1/completions", &body(prompt)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text);
        let error = &answer.json()["error"];
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!(code), &json!("prompt"))
        );
    }
    let gap = with(&body(json!("The lamp")), json!({"suffix": "burned on"}));
    let answer = server.post("/v1/completions", &gap).await.json();
    assert_eq!(answer["error"]["param"], "suffix");
}

#[tokio::test]
async fn echo_puts_the_prompt_in_front_of_its_text() {
    let server = Server::new();
    let prompt = "守灯人 counts";
    let plain = complete(&server, &body(json!(prompt))).await;
    let expected = format!("{prompt}{}", plain["choices"][0]["text"].as_str().unwrap());
    for prompt in [json!(prompt), json!(ids(&server, prompt))] {
        let echoed = with(&body(prompt), json!({"echo": true}));
        let whole = complete(&server, &echoed).await;
        assert_eq!(whole["choices"][0]["text"], expected);
        assert_eq!(
            whole["usage"]["total_tokens"],
            plain["usage"]["total_tokens"]
        );
        let streamed = with(&echoed, json!({"stream": true}));
        let streamed = server.post("/v1/completions", &streamed).await;
        let text: String = streamed
            .chunks()
            .iter()
            .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(text, expected);
    }
}

#[tokio::test]
async fn echoed_tokens_carry_their_own_log_probabilities() {
    let server = Server::new();
    // What was generated after a prompt is scored alike when it is a prompt itself.
    let prompt = ids(&server, "The lamp burned");
    let drawn = complete(
        &server,
        &with(&body(json!(prompt)), json!({"logprobs": 3, "echo": true})),
    )
    .await;
    let drawn = &drawn["choices"][0]["logprobs"];
    let n_prompt = prompt.len();
    let texts = drawn["tokens"].as_array().unwrap();
    assert_eq!(texts.len(), n_prompt + 12);
    let scores = numbers(&drawn["token_logprobs"]);
    assert_eq!(scores[0], None);
    assert!(
        scores[1..]
            .iter()
            .all(|score| score.is_some_and(|score| score <= 0.0))
    );
    assert_eq!(drawn["top_logprobs"][0], Value::Null);
    for (at, text) in texts.iter().enumerate().skip(1) {
        let top = drawn["top_logprobs"][at].as_object().unwrap();
        assert!((1..=4).contains(&top.len()), "{top:?}");
        assert!(top.contains_key(text.as_str().unwrap()), "{at}");
    }
    let offsets = numbers(&drawn["text_offset"]);
    assert!(
        offsets.windows(2).all(|pair| pair[0] <= pair[1]),
        "{offsets:?}"
    );
    assert_eq!(offsets[n_prompt], Some("The lamp burned".len() as f64));
}

#[tokio::test]
async fn streamed_echo_carries_the_same_scores_for_every_reply() {
    let server = Server::new();
    let asked = json!({"echo": true, "logprobs": 1, "n": 2});
    let asked = with(&body(json!(["The lamp", "Nobody"])), asked);
    let whole = complete(&server, &asked).await;
    let streamed = with(&asked, json!({"stream": true}));
    let streamed = server.post("/v1/completions", &streamed).await;
    let mut scores: Vec<Vec<Value>> = vec![Vec::new(); 4];
    for chunk in streamed.chunks() {
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        let tokens = &choice["logprobs"]["token_logprobs"];
        scores[index].extend(tokens.as_array().unwrap().clone());
    }
    for (choice, scores) in whole["choices"].as_array().unwrap().iter().zip(scores) {
        assert_eq!(choice["logprobs"]["token_logprobs"], json!(scores));
        assert_eq!(scores[0], Value::Null);
    }
}

#[tokio::test]
async fn text_is_scored_as_a_prompt_as_it_was_when_it_was_generated() {
    let server = Server::new();
    let letters =
        ["a", "b", "c", "d", "e", "n", "o", "t"].map(|letter| (letter, ids(&server, letter)[0]));
    let mut prompt = ids(&server, "The lamp burned");
    let drawn = json!({
        "logprobs": 0, "max_tokens": 20, "allowed_token_ids": letters.map(|(_, id)| id),
    });
    let drawn = complete(&server, &with(&body(json!(prompt)), drawn)).await;
    let drawn = &drawn["choices"][0]["logprobs"];
    let n_prompt = prompt.len();
    for token in drawn["tokens"].as_array().unwrap() {
        prompt.extend(
            letters
                .iter()
                .filter(|(letter, _)| token == letter)
                .map(|(_, id)| *id),
        );
    }
    assert_eq!(prompt.len(), n_prompt + 20);
    let scored = with(
        &body(json!(prompt)),
        json!({"logprobs": 0, "echo": true, "max_tokens": 0}),
    );
    let scored = complete(&server, &scored).await;
    let scored = numbers(&scored["choices"][0]["logprobs"]["token_logprobs"]);
    for (drawn, scored) in numbers(&drawn["token_logprobs"])
        .iter()
        .zip(&scored[n_prompt..])
    {
        let (drawn, scored) = (drawn.unwrap(), scored.unwrap());
        assert!(
            (drawn - scored).abs() < TOLERANCE,
            "{drawn} against {scored}"
        );
    }
}

#[tokio::test]
async fn prompts_can_be_scored_without_generating_and_whatever_is_kept() {
    let server = Server::new();
    let prompts = [
        "The lighthouse keeper counted the boats.",
        "Nobody came home that night",
    ];
    let scored =
        json!({"prompt": prompts, "max_tokens": 0, "echo": true, "logprobs": 1, "temperature": 0});
    let first = complete(&server, &scored).await;
    for (index, prompt) in prompts.iter().enumerate() {
        let choice = &first["choices"][index];
        assert_eq!(choice["text"], *prompt);
        assert_eq!(choice["finish_reason"], "length");
        let n = ids(&server, prompt).len();
        assert_eq!(choice["logprobs"]["tokens"].as_array().unwrap().len(), n);
        let spelt: String = choice["logprobs"]["tokens"]
            .as_array()
            .unwrap()
            .iter()
            .map(|token| token.as_str().unwrap())
            .collect();
        assert_eq!(spelt, *prompt);
    }
    assert_eq!(first["usage"]["completion_tokens"], 0);
    // Now the prompts' states are kept: the scores are there all the same.
    complete(&server, &body(json!(prompts))).await;
    let second = complete(&server, &scored).await;
    assert_eq!(first["choices"], second["choices"]);
    // Each alone, in a list, and beside a reply that runs.
    let alone = complete(&server, &with(&scored, json!({"prompt": prompts[1]}))).await;
    assert_eq!(
        alone["choices"][0]["logprobs"],
        first["choices"][1]["logprobs"]
    );
}

#[tokio::test]
async fn token_that_ends_the_reply_is_among_the_scored_ones() {
    let server = Server::new();
    let end = server.state.setup().chat.tokenizer().eos();
    let prompt = ids(&server, "The lamp");
    let asked = json!({
        "prompt": [prompt], "max_tokens": 1, "echo": true, "logprobs": 1, "temperature": 0, "seed": 1234,
        "logit_bias": {end.to_string(): 100},
    });
    let answer = complete(&server, &asked).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["text"], "The lamp");
    // Who cuts off the one generated token, as lm-eval does, is left with the prompt.
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    assert_eq!(tokens.len(), prompt.len() + 1);
    assert_eq!(tokens[prompt.len()], "<|im_end|>");
}
