//! The table itself: docs/api.md shows it as it is here.

use super::Neutral::{Below, Empty, Numbers, True, Words};
use super::Rule::{self, Alias, Part, Read, Refused, Taken};
use super::{Endpoint, Group};

const OPENAI: &str = "OpenAI";
const VLLM: &str = "vLLM";
const LLAMA: &str = "llama.cpp";
const KOBOLD: &str = "KoboldCpp";
const WEBUI: &str = "text-generation-webui";
const FRONT_ENDS: &str = "role-play front ends";
const HERE: &str = "this server";

const SAMPLERS: &str = "leave it at a value that turns it off, and use temperature, top_p, top_k, min_p or the penalties";
const FORM: &str = "this server does not bind a reply to a form; ask for the form in the messages";
const OWN_TEMPLATE: &str =
    "the model's own chat template and stored system prompt hold; say the rest in `messages`";
const OPENAI_SHAPE: &str = "an answer has OpenAI's fields; ask for `logprobs`";
const BANS: &str = "use `logit_bias` with -100 for ids, or `bad_words` for words";

const fn both(names: &'static [&'static str], from: &'static str, rule: Rule) -> Group {
    Group {
        names,
        from,
        endpoint: None,
        rule,
    }
}

const fn at(
    endpoint: Endpoint,
    names: &'static [&'static str],
    from: &'static str,
    rule: Rule,
) -> Group {
    Group {
        names,
        from,
        endpoint: Some(endpoint),
        rule,
    }
}

/// The table.
pub(crate) const GROUPS: &[Group] = &[
    // what is asked
    both(&["model"], OPENAI, Read("the name served, or left out")),
    at(Endpoint::Chat, &["messages"], OPENAI, Read("see below")),
    at(
        Endpoint::Completions,
        &["prompt"],
        OPENAI,
        Read("a string, a list of token ids, or a list of either"),
    ),
    at(
        Endpoint::Completions,
        &["echo"],
        OPENAI,
        Read("the prompt in front of the text; with `logprobs` scored from its second token on"),
    ),
    at(
        Endpoint::Chat,
        &["chat_template_kwargs"],
        VLLM,
        Read("`enable_thinking`, false if absent; others are refused"),
    ),
    at(
        Endpoint::Chat,
        &["enable_thinking"],
        WEBUI,
        Read("as in `chat_template_kwargs`"),
    ),
    at(
        Endpoint::Chat,
        &["continue_final_message"],
        VLLM,
        Read(
            "goes on with the last message, an assistant's; `add_generation_prompt` must not be true",
        ),
    ),
    at(
        Endpoint::Chat,
        &["add_generation_prompt"],
        VLLM,
        Read("true, or false with `continue_final_message`"),
    ),
    at(
        Endpoint::Chat,
        &["continue_"],
        WEBUI,
        Read("as `continue_final_message`"),
    ),
    // how tokens are chosen
    both(
        &["profile"],
        HERE,
        Read("sampling values for what the request leaves open"),
    ),
    both(
        &["temperature"],
        OPENAI,
        Read("0 to 10; 0 takes the likeliest token"),
    ),
    both(&["top_p"], OPENAI, Read("above 0, at most 1")),
    both(&["top_k"], VLLM, Read("0 and -1 turn it off")),
    both(&["min_p"], VLLM, Read("0 to 1")),
    both(
        &["presence_penalty", "frequency_penalty"],
        OPENAI,
        Read("-10 to 10, over generated tokens"),
    ),
    both(
        &["repetition_penalty"],
        VLLM,
        Read("above 0, at most 10, over prompt and reply; 1 turns it off"),
    ),
    both(
        &["repetition_penalty_range"],
        WEBUI,
        Read("how many of the last tokens `repetition_penalty` looks at; 0 and -1 mean all"),
    ),
    both(
        &["repeat_last_n"],
        LLAMA,
        Read("the same, but 0 turns the penalty off; `repetition_penalty_range` goes before it"),
    ),
    both(&["seed"], OPENAI, Read("a whole number; -1 as if left out")),
    both(
        &["logit_bias"],
        OPENAI,
        Read(
            "-100 to 100 by token id, as an object or, with llama.cpp's pairs, as a list; special tokens that no reply may hold stay out",
        ),
    ),
    both(
        &["allowed_token_ids"],
        VLLM,
        Read("the only ids that may be drawn"),
    ),
    both(
        &["bad_words"],
        VLLM,
        Read("words whose tokens are not drawn in a row"),
    ),
    // how long, and until what
    both(
        &["max_tokens"],
        OPENAI,
        Read("-1 means up to the context; 0 only with `echo`; 2048 if absent"),
    ),
    both(
        &["max_completion_tokens"],
        OPENAI,
        Read("the newer name of `max_tokens`, and goes before it"),
    ),
    both(&["min_tokens"], VLLM, Read("nothing ends the reply before")),
    both(
        &["stop"],
        OPENAI,
        Read("a string or up to 256; empty ones are left out"),
    ),
    both(
        &["stop_token_ids"],
        VLLM,
        Read("up to 1024 ids, beside the model's own"),
    ),
    both(
        &["ignore_eos"],
        VLLM,
        Read("the model's own end does not end the reply"),
    ),
    both(
        &["include_stop_str_in_output"],
        VLLM,
        Read("what stopped the reply stays in it"),
    ),
    // the answer's form
    both(&["n"], OPENAI, Read("1 to 8 replies to each prompt")),
    both(
        &["best_of"],
        OPENAI,
        Read("as many as `n` at most: replies are not ranked"),
    ),
    both(
        &["stream", "stream_options"],
        OPENAI,
        Read("`include_usage`"),
    ),
    at(Endpoint::Chat, &["logprobs"], OPENAI, Read("true or false")),
    at(
        Endpoint::Chat,
        &["top_logprobs"],
        OPENAI,
        Read("0 to 20, with `logprobs`"),
    ),
    at(
        Endpoint::Completions,
        &["logprobs"],
        OPENAI,
        Read("0 to 20"),
    ),
    both(
        &["skip_special_tokens"],
        VLLM,
        Read("false shows special tokens in the text"),
    ),
    both(
        &["response_format"],
        OPENAI,
        Read("`text` alone; others are refused"),
    ),
    at(
        Endpoint::Chat,
        &["tool_choice"],
        OPENAI,
        Read("`none` or `auto`: there are no tools"),
    ),
    both(
        &["cyrene_lines"],
        HERE,
        Read("each line with its perplexity"),
    ),
    // other names
    both(&["n_predict"], LLAMA, Alias("max_tokens")),
    both(&["num_predict"], "Ollama", Alias("max_tokens")),
    both(&["max_new_tokens"], WEBUI, Alias("max_tokens")),
    both(&["max_length"], KOBOLD, Alias("max_tokens")),
    both(&["min_length"], WEBUI, Alias("min_tokens")),
    both(&["stopping_strings"], WEBUI, Alias("stop")),
    both(&["stop_sequence", "stop_sequences"], KOBOLD, Alias("stop")),
    both(&["sampler_seed"], KOBOLD, Alias("seed")),
    both(&["repeat_penalty"], LLAMA, Alias("repetition_penalty")),
    both(&["rep_pen"], KOBOLD, Alias("repetition_penalty")),
    both(
        &["rep_pen_range", "penalty_range"],
        KOBOLD,
        Alias("repetition_penalty_range"),
    ),
    both(&["ban_eos_token"], WEBUI, Alias("ignore_eos")),
    // cannot change the answer
    both(
        &[
            "user",
            "metadata",
            "store",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prediction",
        ],
        OPENAI,
        Taken("says who asks, or how the answer is kept or hurried"),
    ),
    both(
        &["priority", "request_id", "cache_salt", "data_parallel_rank"],
        VLLM,
        Taken("says in what order and where requests are computed"),
    ),
    both(
        &[
            "add_special_tokens",
            "add_bos_token",
            "spaces_between_special_tokens",
        ],
        VLLM,
        Taken("this tokenizer puts no token in front of a text and no blank between tokens"),
    ),
    both(
        &[
            "include_reasoning",
            "separate_reasoning",
            "reasoning_format",
        ],
        VLLM,
        Taken("thoughts, where they were asked for, are part of the text"),
    ),
    both(
        &[
            "cache_prompt",
            "id_slot",
            "slot_id",
            "n_cache_reuse",
            "timings_per_token",
            "return_progress",
            "speculative.n_max",
            "speculative.n_min",
            "speculative.p_min",
        ],
        LLAMA,
        Taken("says how a reply is computed, not which"),
    ),
    both(
        &[
            "n_keep",
            "n_discard",
            "num_ctx",
            "truncation_length",
            "max_context_length",
        ],
        FRONT_ENDS,
        Taken("a prompt is never cut: one that is longer than the context is refused"),
    ),
    both(
        &[
            "api_type",
            "api_server",
            "genkey",
            "quiet",
            "session_id",
            "conversation_id",
            "chat_id",
            "max_tokens_second",
            "prompt_lookup_num_tokens",
            "speculative_ngram",
            "static_cache",
        ],
        FRONT_ENDS,
        Taken("names the client, or says how fast a reply is shown"),
    ),
    // only with another field
    both(
        &[
            "dry_base",
            "dry_allowed_length",
            "dry_penalty_last_n",
            "dry_sequence_breakers",
        ],
        LLAMA,
        Part("dry_multiplier"),
    ),
    both(&["xtc_threshold"], LLAMA, Part("xtc_probability")),
    both(&["mirostat_tau", "mirostat_eta"], LLAMA, Part("mirostat")),
    both(&["dynatemp_exponent"], LLAMA, Part("dynatemp_range")),
    both(
        &["dynatemp_low", "dynatemp_high", "dynatemp_mode"],
        WEBUI,
        Part("dynamic_temperature"),
    ),
    both(&["smoothing_curve"], WEBUI, Part("smoothing_factor")),
    both(&["adaptive_decay"], FRONT_ENDS, Part("adaptive_target")),
    both(
        &["early_stopping", "length_penalty"],
        VLLM,
        Part("use_beam_search"),
    ),
    both(
        &["guided_decoding_backend", "guided_whitespace_pattern"],
        VLLM,
        Part("guided_json"),
    ),
    both(
        &["grammar_lazy", "grammar_triggers", "grammar_retain_state"],
        LLAMA,
        Part("grammar"),
    ),
    both(&["post_sampling_probs"], LLAMA, Part("n_probs")),
    both(&["negative_prompt"], FRONT_ENDS, Part("guidance_scale")),
    at(
        Endpoint::Chat,
        &["parallel_tool_calls"],
        OPENAI,
        Part("tools"),
    ),
    at(Endpoint::Chat, &["audio"], OPENAI, Part("modalities")),
    // the form of a reply
    both(
        &[
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
            "guided_decoding",
            "structured_outputs",
            "structural_tag",
        ],
        VLLM,
        Refused(Empty, FORM),
    ),
    both(&["grammar", "json_schema"], LLAMA, Refused(Empty, FORM)),
    both(
        &["grammar_string", "regex_pattern", "regex", "ebnf"],
        FRONT_ENDS,
        Refused(Empty, FORM),
    ),
    // samplers that are not here
    both(
        &["typical_p", "tfs_z"],
        LLAMA,
        Refused(Numbers(&[1.0]), SAMPLERS),
    ),
    both(
        &[
            "typical",
            "tfs",
            "encoder_repetition_penalty",
            "min_temp",
            "max_temp",
            "temp_exponent",
        ],
        FRONT_ENDS,
        Refused(Numbers(&[1.0]), SAMPLERS),
    ),
    both(
        &[
            "mirostat",
            "xtc_probability",
            "dry_multiplier",
            "dynatemp_range",
        ],
        LLAMA,
        Refused(Numbers(&[0.0]), SAMPLERS),
    ),
    both(
        &["top_n_sigma"],
        LLAMA,
        Refused(Numbers(&[0.0, -1.0]), SAMPLERS),
    ),
    both(
        &[
            "top_a",
            "smoothing_factor",
            "epsilon_cutoff",
            "eta_cutoff",
            "mirostat_mode",
            "penalty_alpha",
            "no_repeat_ngram_size",
            "skew",
            "dynatemp_min",
            "dynatemp_max",
            "repetition_decay",
        ],
        FRONT_ENDS,
        Refused(Numbers(&[0.0]), SAMPLERS),
    ),
    both(
        &["min_keep", "rep_pen_slope"],
        FRONT_ENDS,
        Refused(Numbers(&[0.0, 1.0]), SAMPLERS),
    ),
    both(
        &["nsigma"],
        FRONT_ENDS,
        Refused(Numbers(&[0.0, -1.0]), SAMPLERS),
    ),
    both(
        &["adaptive_target"],
        FRONT_ENDS,
        Refused(Below(0.0), SAMPLERS),
    ),
    both(&["dynamic_temperature"], WEBUI, Refused(Empty, SAMPLERS)),
    both(
        &["guidance_scale", "cfg_scale"],
        FRONT_ENDS,
        Refused(Numbers(&[0.0, 1.0]), SAMPLERS),
    ),
    both(
        &["samplers"],
        LLAMA,
        Refused(
            Empty,
            "the order is fixed: bias, penalties, temperature, min_p, top_k, top_p; leave it out",
        ),
    ),
    both(
        &["sampler_order", "sampler_priority", "temperature_last"],
        FRONT_ENDS,
        Refused(
            Empty,
            "the order is fixed: bias, penalties, temperature, min_p, top_k, top_p; leave it out",
        ),
    ),
    both(
        &["use_beam_search"],
        VLLM,
        Refused(
            Empty,
            "replies are drawn, not searched; use `temperature` 0",
        ),
    ),
    both(
        &["num_beams"],
        WEBUI,
        Refused(
            Numbers(&[1.0]),
            "replies are drawn, not searched; use `temperature` 0",
        ),
    ),
    both(
        &["do_sample"],
        WEBUI,
        Refused(True, "use `temperature` 0 for the likeliest tokens"),
    ),
    both(
        &[
            "banned_tokens",
            "banned_strings",
            "custom_token_bans",
            "ban_tokens",
        ],
        FRONT_ENDS,
        Refused(Empty, BANS),
    ),
    both(&["use_default_badwordsids"], KOBOLD, Refused(Empty, BANS)),
    both(
        &["logits_processors", "vllm_xargs", "repetition_detection"],
        VLLM,
        Refused(Empty, "leave it out: no code or rules come with a request"),
    ),
    // what the model reads
    at(
        Endpoint::Completions,
        &["suffix"],
        OPENAI,
        Refused(
            Empty,
            "this model fills no gaps; put all it is to read into `prompt`",
        ),
    ),
    at(
        Endpoint::Chat,
        &["echo"],
        VLLM,
        Refused(Empty, "join the last message with the answer yourself"),
    ),
    at(
        Endpoint::Chat,
        &["tools", "functions", "function_call", "web_search_options"],
        OPENAI,
        Refused(Words(&["none"]), "this model calls no tools; leave it out"),
    ),
    at(
        Endpoint::Chat,
        &["modalities"],
        OPENAI,
        Refused(Words(&["text"]), "this model writes text only"),
    ),
    at(
        Endpoint::Chat,
        &["reasoning_effort"],
        OPENAI,
        Refused(
            Words(&["none"]),
            "use `chat_template_kwargs` with `enable_thinking`",
        ),
    ),
    both(
        &["thinking_token_budget", "thinking_budget_tokens"],
        VLLM,
        Refused(Numbers(&[0.0, -1.0]), "use `max_tokens`"),
    ),
    at(
        Endpoint::Chat,
        &["verbosity"],
        OPENAI,
        Refused(
            Words(&["medium"]),
            "say in the messages how long the answer is to be",
        ),
    ),
    at(
        Endpoint::Chat,
        &["documents", "chat_template"],
        VLLM,
        Refused(Empty, OWN_TEMPLATE),
    ),
    at(
        Endpoint::Chat,
        &[
            "instruction_template",
            "instruction_template_str",
            "chat_template_str",
            "chat_instruct_command",
            "character",
            "user_name",
            "user_bio",
            "bot_name",
            "name1",
            "name2",
            "names",
            "context",
            "greeting",
            "regenerate",
            "impersonate",
        ],
        WEBUI,
        Refused(Empty, OWN_TEMPLATE),
    ),
    at(
        Endpoint::Chat,
        &["mode"],
        WEBUI,
        Refused(Words(&["instruct"]), OWN_TEMPLATE),
    ),
    both(
        &["preset"],
        WEBUI,
        Refused(Words(&["None"]), "use `profile`"),
    ),
    both(
        &["auto_max_new_tokens"],
        WEBUI,
        Refused(Empty, "use `max_tokens` -1"),
    ),
    both(
        &["memory", "adapter"],
        KOBOLD,
        Refused(
            Empty,
            "put all the model is to read into `messages` or `prompt`",
        ),
    ),
    both(
        &["trim_stop"],
        KOBOLD,
        Refused(True, "use `include_stop_str_in_output`"),
    ),
    both(
        &["lora", "control_vectors"],
        LLAMA,
        Refused(Empty, "the server's weights hold for every request"),
    ),
    both(
        &["image_data", "images", "multimodal_data"],
        LLAMA,
        Refused(Empty, "this model reads text only"),
    ),
    both(
        &["mm_processor_kwargs", "media_io_kwargs", "prompt_embeds"],
        VLLM,
        Refused(Empty, "this model reads text only"),
    ),
    both(
        &["truncate_prompt_tokens"],
        VLLM,
        Refused(Numbers(&[-1.0]), "cut the prompt before sending it"),
    ),
    both(
        &["kv_transfer_params"],
        VLLM,
        Refused(Empty, "this server computes its prompts itself"),
    ),
    // the answer's form
    both(
        &["prompt_logprobs"],
        VLLM,
        Refused(Empty, "use `echo` with `logprobs` at /v1/completions"),
    ),
    both(
        &[
            "return_token_ids",
            "return_tokens_as_token_ids",
            "return_prompt_text",
        ],
        VLLM,
        Refused(Empty, OPENAI_SHAPE),
    ),
    both(&["n_probs"], LLAMA, Refused(Numbers(&[0.0]), OPENAI_SHAPE)),
    both(
        &["return_tokens", "response_fields"],
        LLAMA,
        Refused(Empty, OPENAI_SHAPE),
    ),
    both(
        &["n_indent"],
        LLAMA,
        Refused(Numbers(&[0.0]), "leave it out"),
    ),
    both(
        &["t_max_predict_ms", "t_max_prompt_ms"],
        LLAMA,
        Refused(Numbers(&[0.0, -1.0]), "use `max_tokens`"),
    ),
];
