//! The engine against recorded greedy continuations and their log-probabilities. Needs the reference pack beside the checkout.

use std::path::PathBuf;

use engine::{Engine, EngineConfig, Event, Request, Sampling};
use kernel::{DType, Device};
use model::Model;
use serde::Deserialize;

#[derive(Deserialize)]
struct Recorded {
    prompt_ids: Vec<u32>,
    generated_ids: Vec<u32>,
    logprobs: Vec<f32>,
}

/// f32 against f32 by another implementation; the pack itself gives 1e-4 for incremental against full logits.
const TOLERANCE: f32 = 1e-3;

#[test]
fn greedy_gives_the_recorded_tokens() {
    let Some(reference) = reference() else {
        return;
    };
    for name in ["tiny_a", "tiny_b"] {
        let text = std::fs::read_to_string(reference.join(format!("goldens/{name}/greedy.json")));
        let recorded: Recorded = serde_json::from_str(&text.unwrap()).unwrap();
        let model = Model::load(&reference.join("models").join(name), DType::F32).unwrap();
        let model = model.to_device(Device::for_tests()).unwrap();
        let engine = Engine::start(model, EngineConfig::default()).unwrap();
        let receiver = engine
            .submit(Request {
                ids: recorded.prompt_ids,
                max_tokens: recorded.generated_ids.len(),
                sampling: Sampling::greedy(),
                ..Request::default()
            })
            .unwrap();
        let tokens: Vec<(u32, f32)> = receiver
            .filter_map(|event| match event {
                Event::Token { id, logprob, .. } => Some((id, logprob)),
                Event::Failed(error) => panic!("{name}: {error}"),
                Event::Prompt(_) | Event::Finished { .. } => None,
            })
            .collect();
        let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, recorded.generated_ids, "{name}");
        for ((_, got), expected) in tokens.iter().zip(recorded.logprobs) {
            assert!(
                (got - expected).abs() < TOLERANCE,
                "{name}: {got} against {expected}"
            );
        }
    }
}

fn reference() -> Option<PathBuf> {
    let shared = std::env::var_os("CYRENE_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        PathBuf::from,
    );
    let reference = shared.join("reference");
    if reference.is_dir() {
        return Some(reference);
    }
    let required = std::env::var("CYRENE_REQUIRE_SHARED").is_ok_and(|value| value == "1");
    assert!(!required, "no {}", reference.display());
    println!("skipped: no ../shared");
    None
}
