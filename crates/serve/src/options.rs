//! What both kinds of completion ask for beside their prompt, read from a request's fields; what is absent comes from the profile.

use engine::Sampling;
use serde_json::Value;
use text::Tokenizer;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::reply::ReplyOptions;
use crate::state::AppState;

/// Most ids that end a reply beside the model's own.
const MOST_STOP_IDS: usize = 1024;
/// Most words that a reply may not hold.
const MOST_BAD_WORDS: usize = 1024;

/// The options of a request.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub sampling: Sampling,
    /// Tokens of each reply at most; 0 = the prompt is only to be scored.
    pub max_tokens: usize,
    pub min_tokens: usize,
    pub stop_ids: Vec<u32>,
    pub top_logprobs: usize,
    /// Replies to each prompt.
    pub n: usize,
    /// The prompt is part of the reply.
    pub echo: bool,
    pub stream: bool,
    pub include_usage: bool,
    pub reply: ReplyOptions,
}

impl Options {
    /// Reads everything but prompt, model and logprobs.
    pub fn parse(fields: &Fields, state: &AppState) -> Result<Self, ApiError> {
        let setup = state.setup();
        let tokenizer = setup.chat.tokenizer();
        let echo = fields.boolean("echo")?.unwrap_or(false);
        let max_tokens = read_max_tokens(fields, echo)?.unwrap_or(setup.limits.default_max_tokens);
        let min_tokens = fields.integer("min_tokens", 0..=u64::from(u32::MAX))?;
        let min_tokens = min_tokens.unwrap_or(0) as usize;

        let mut stop_ids = match fields.boolean("ignore_eos")? {
            Some(true) => Vec::new(),
            _ => tokenizer.end_ids(),
        };
        stop_ids.extend(fields.ids("stop_token_ids", MOST_STOP_IDS)?);

        let include_usage = match fields.object("stream_options")? {
            Some(options) => {
                options.only(&["include_usage", "include_obfuscation"])?;
                options.boolean("include_usage")?.unwrap_or(false)
            }
            None => false,
        };
        check_response_format(fields)?;
        let n = fields.integer("n", 1..=setup.limits.n)?.unwrap_or(1);
        let best_of = fields.integer("best_of", 0..=setup.limits.n)?.unwrap_or(1);
        if best_of > n {
            return Err(ApiError::field(
                fields.name("best_of"),
                "must be at most `n`: this server does not rank replies; ask for `n` and choose",
            ));
        }
        Ok(Options {
            sampling: read_sampling(fields, state)?,
            max_tokens,
            min_tokens,
            stop_ids,
            top_logprobs: 0,
            n: n as usize,
            echo,
            stream: fields.boolean("stream")?.unwrap_or(false),
            include_usage,
            reply: ReplyOptions {
                stops: fields.strings("stop", setup.limits.stop_strings)?,
                include_stop: fields
                    .boolean("include_stop_str_in_output")?
                    .unwrap_or(false),
                min_tokens,
                keep_special: !fields.boolean("skip_special_tokens")?.unwrap_or(true),
                lines: fields.boolean("cyrene_lines")?.unwrap_or(false),
                ..ReplyOptions::default()
            },
        })
    }
}

/// `max_completion_tokens`, else `max_tokens`; -1 means up to the context, 0 is for prompts that are only echoed.
fn read_max_tokens(fields: &Fields, echo: bool) -> Result<Option<usize>, ApiError> {
    for field in ["max_completion_tokens", "max_tokens"] {
        if fields.is_minus_one(field) {
            return Ok(Some(usize::MAX));
        }
        let least = u64::from(!echo);
        if let Some(n) = fields.integer(field, least..=u64::from(u32::MAX))? {
            return Ok(Some(n as usize));
        }
    }
    Ok(None)
}

fn check_response_format(fields: &Fields) -> Result<(), ApiError> {
    let Some(format) = fields.object("response_format")? else {
        return Ok(());
    };
    match format.string("type")? {
        None | Some("text") => Ok(()),
        Some(_) => Err(ApiError::field(
            format.name("type"),
            "must be `text`: this server does not bind a reply to a form; ask for the form in the messages",
        )),
    }
}

/// The profile's values, then the request's own.
fn read_sampling(fields: &Fields, state: &AppState) -> Result<Sampling, ApiError> {
    let setup = state.setup();
    let profiles = &setup.profiles;
    let name = fields.string("profile")?;
    let Some(profile) = profiles.find(name.unwrap_or(profiles.active_name())) else {
        return Err(ApiError::field(
            fields.name("profile"),
            format!("must be one of {}", profiles.names()),
        ));
    };
    let mut sampling = profile.sampling();
    let numbers: [(&str, f64, f64, &mut f32); 6] = [
        ("temperature", 0.0, 10.0, &mut sampling.temperature),
        ("top_p", 1e-6, 1.0, &mut sampling.top_p),
        ("min_p", 0.0, 1.0, &mut sampling.min_p),
        (
            "presence_penalty",
            -10.0,
            10.0,
            &mut sampling.presence_penalty,
        ),
        (
            "frequency_penalty",
            -10.0,
            10.0,
            &mut sampling.frequency_penalty,
        ),
        (
            "repetition_penalty",
            1e-6,
            10.0,
            &mut sampling.repetition_penalty,
        ),
    ];
    for (field, least, most, target) in numbers {
        if let Some(value) = fields.number(field, least..=most)? {
            *target = value as f32;
        }
    }
    sampling.repetition_window = read_repetition_window(fields)?;
    sampling.top_k = read_top_k(fields)?.unwrap_or(sampling.top_k);
    if !fields.is_minus_one("seed") {
        sampling.seed = fields.integer("seed", 0..=u64::MAX)?;
    }
    read_logit_bias(fields, &mut sampling)?;
    let tokenizer = setup.chat.tokenizer();
    sampling.allowed = fields.ids("allowed_token_ids", tokenizer.vocab_size())?;
    for word in fields.strings("bad_words", MOST_BAD_WORDS)? {
        let spellings = spellings(tokenizer, &word)?;
        sampling.bad_sequences.extend(spellings);
    }
    sampling.vocab_limit = u32::try_from(tokenizer.vocab_size()).ok();
    Ok(sampling)
}

/// `top_k`: 0 and, as vLLM has it, -1 mean off.
fn read_top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    if fields.is_minus_one("top_k") {
        return Ok(Some(0));
    }
    let value = fields.integer("top_k", 0..=u64::from(u32::MAX))?;
    Ok(value.map(|k| k as u32))
}

/// The last tokens that the repetition penalty looks at; `None` = all.
fn read_repetition_window(fields: &Fields) -> Result<Option<usize>, ApiError> {
    for (field, zero) in [
        ("repetition_penalty_range", None),
        ("repeat_last_n", Some(0)),
    ] {
        if fields.is_minus_one(field) {
            return Ok(None);
        }
        match fields.integer(field, 0..=u64::from(u32::MAX))? {
            Some(0) => return Ok(zero),
            Some(n) => return Ok(Some(n as usize)),
            None => {}
        }
    }
    Ok(None)
}

/// `logit_bias`: what is added to ids, and ids that are never drawn. An object from ids to numbers, or llama.cpp's list of pairs
/// of an id and a number, or false for never.
fn read_logit_bias(fields: &Fields, sampling: &mut Sampling) -> Result<(), ApiError> {
    const FIELD: &str = "logit_bias";
    let Some(value) = fields.get(FIELD) else {
        return Ok(());
    };
    let refusal = |got: &Value| {
        let expected = "an object from token ids to numbers from -100 to 100";
        fields.refusal(FIELD, expected, got)
    };
    let pairs: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(id, bias)| (id.clone(), bias)).collect(),
        Value::Array(list) => list
            .iter()
            .map(|pair| match pair.as_array().map(Vec::as_slice) {
                Some([id, bias]) if !id.is_string() => Ok((id.to_string(), bias)),
                _ => Err(refusal(pair)),
            })
            .collect::<Result<_, _>>()?,
        other => return Err(refusal(other)),
    };
    for (id, bias) in pairs {
        let id = id.parse().map_err(|_| refusal(&Value::String(id)))?;
        match bias {
            Value::Bool(false) => sampling.banned.push(id),
            bias => match bias.as_f64().filter(|b| (-100.0..=100.0).contains(b)) {
                Some(bias) => sampling.bias.push((id, bias as f32)),
                None => return Err(refusal(bias)),
            },
        }
    }
    Ok(())
}

/// The ids of a word at the beginning of a text, and after a blank where that makes another first token of it.
/// Source: vLLM's `bad_words`.
fn spellings(tokenizer: &Tokenizer, word: &str) -> Result<Vec<Vec<u32>>, ApiError> {
    let plain = tokenizer.encode(word)?;
    let after_blank = tokenizer.encode(&format!(" {}", word.trim_start()))?;
    let is_another = after_blank.first() != plain.first() && after_blank.len() == plain.len();
    let mut spellings = vec![plain];
    if is_another {
        spellings.push(after_blank);
    }
    Ok(spellings)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use text::{ChatEncoder, ChatTemplate, Persona};

    use super::*;
    use crate::{Limits, Profiles, Setup};

    fn state() -> AppState {
        AppState::new(Setup {
            model: "tiny".to_owned(),
            chat: ChatEncoder::new(
                Tokenizer::train(["the cat sat on the mat"].into_iter(), 300).unwrap(),
                ChatTemplate::history_stable().unwrap(),
            ),
            profiles: Profiles::built_in().unwrap(),
            persona: Persona::default(),
            n_params: 0,
            api_keys: Vec::new(),
            allowed_origins: crate::AllowedOrigins::default(),
            allowed_hosts: crate::AllowedHosts::default(),
            limits: Limits::default(),
        })
    }

    fn parse(body: Value) -> Result<Options, String> {
        let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        Options::parse(&fields, &state()).map_err(|error| error.to_string())
    }

    #[test]
    fn sentinels_mean_none_and_whole_floats_are_whole() {
        for body in [
            json!({"seed": -1}),
            json!({"seed": null}),
            json!({"seed": -1.0}),
        ] {
            assert_eq!(parse(body).unwrap().sampling.seed, None);
        }
        assert_eq!(
            parse(json!({"seed": 42.0})).unwrap().sampling.seed,
            Some(42)
        );
        assert!(parse(json!({"seed": -2})).is_err());
        assert_eq!(
            parse(json!({"max_tokens": -1})).unwrap().max_tokens,
            usize::MAX
        );
        assert_eq!(
            parse(json!({"max_completion_tokens": -1}))
                .unwrap()
                .max_tokens,
            usize::MAX
        );
        assert_eq!(parse(json!({"max_tokens": 7.0})).unwrap().max_tokens, 7);
        assert_eq!(parse(json!({"max_tokens": null})).unwrap().max_tokens, 2048);
        assert!(parse(json!({"max_tokens": 0})).is_err());
        assert_eq!(
            parse(json!({"max_tokens": 0, "echo": true}))
                .unwrap()
                .max_tokens,
            0
        );
        assert_eq!(parse(json!({"top_k": -1})).unwrap().sampling.top_k, 0);
        assert_eq!(parse(json!({"n": 2.0, "best_of": 2})).unwrap().n, 2);
    }

    #[test]
    fn refusals_name_limits_that_a_request_can_keep() {
        let n_ids = state().setup().chat.tokenizer().vocab_size();
        for (field, limit) in [
            (
                "allowed_token_ids",
                format!("a list of at most {n_ids} token ids"),
            ),
            ("best_of", "from 0 to 8".to_owned()),
            ("repeat_last_n", "from 0 to 4294967295".to_owned()),
            (
                "repetition_penalty_range",
                "from 0 to 4294967295".to_owned(),
            ),
        ] {
            let error = parse(json!({ field: "x" })).unwrap_err();
            assert!(error.contains(&limit), "{error}");
        }
    }

    #[test]
    fn stop_strings_may_be_many_and_empty_ones_are_left_out() {
        let stops = parse(json!({"stop": ["", "\nUser:"]})).unwrap().reply.stops;
        assert_eq!(stops, ["\nUser:"]);
        assert!(parse(json!({"stop": ""})).unwrap().reply.stops.is_empty());
        let many: Vec<String> = (0..100).map(|n| format!("{n}:")).collect();
        assert_eq!(parse(json!({"stop": many})).unwrap().reply.stops, many);
        assert!(parse(json!({"stop": [5]})).is_err());
    }

    #[test]
    fn biases_come_by_id_as_object_or_pairs() {
        let sampling = parse(json!({"logit_bias": {"5": -100, "6": 1.5}}))
            .unwrap()
            .sampling;
        assert_eq!(sampling.bias, [(5, -100.0), (6, 1.5)]);
        let pairs = json!({"logit_bias": [[5, 1.0], [7, false]]});
        let sampling = parse(pairs).unwrap().sampling;
        assert_eq!((sampling.bias, sampling.banned), (vec![(5, 1.0)], vec![7]));
        for bad in [
            json!({"the": 1}),
            json!({"5": 101}),
            json!({"5": "much"}),
            json!([["the", 1]]),
            json!([5, 1]),
            json!(5),
        ] {
            let error = parse(json!({ "logit_bias": bad })).unwrap_err();
            assert!(error.starts_with("`logit_bias` must be"), "{error}");
        }
    }

    #[test]
    fn repetition_window_has_its_senders_meaning_of_nothing() {
        for (body, expect) in [
            (json!({}), None),
            (json!({"repeat_last_n": -1}), None),
            (json!({"repeat_last_n": 0}), Some(0)),
            (json!({"repeat_last_n": 64}), Some(64)),
            (
                json!({"repetition_penalty_range": 0, "repeat_last_n": 0}),
                None,
            ),
            (json!({"repetition_penalty_range": 1024}), Some(1024)),
        ] {
            let window = parse(body.clone()).unwrap().sampling.repetition_window;
            assert_eq!(window, expect, "{body}");
        }
    }

    #[test]
    fn bad_words_are_spelt_with_and_without_a_blank_in_front() {
        let state = state();
        let tokenizer = state.setup().chat.tokenizer();
        let sequences = parse(json!({"bad_words": ["cat", ""]}))
            .unwrap()
            .sampling
            .bad_sequences;
        assert_eq!(sequences[0], tokenizer.encode("cat").unwrap());
        for sequence in &sequences {
            assert_eq!(
                tokenizer.decode(sequence, false).unwrap().trim_start(),
                "cat"
            );
        }
    }
}
