//! The sampling chain against recorded distributions: probabilities and kept tokens of 22 cases.

use engine::sampling::{self, Counts, DrawContext, Sampling};
use serde::Deserialize;

#[derive(Deserialize)]
struct Case {
    case: usize,
    note: String,
    presence: f32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    logits: Vec<f32>,
    counts: Counts,
    probs: Vec<f64>,
    kept: usize,
}

/// f32 logits against f64 probabilities.
const TOLERANCE: f64 = 1e-5;

#[test]
fn chain_gives_the_recorded_probabilities() {
    let text = include_str!("fixtures/sampler_cases.jsonl");
    let cases: Vec<Case> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(cases.len(), 22);
    for case in cases {
        let sampling = Sampling {
            temperature: case.temperature,
            top_k: case.top_k,
            top_p: case.top_p,
            presence_penalty: case.presence,
            ..Sampling::default()
        };
        let (candidates, probs) = sampling::distribution(
            &case.logits,
            &DrawContext::of_counts(&case.counts),
            &sampling,
        )
        .unwrap();
        let name = format!("case {} {}", case.case, case.note);
        assert_eq!(candidates.len(), case.kept, "{name}");
        let mut dense = vec![0.0; case.logits.len()];
        for (candidate, prob) in candidates.iter().zip(probs) {
            dense[candidate.id as usize] = prob;
        }
        for (id, (got, expected)) in dense.iter().zip(&case.probs).enumerate() {
            assert!(
                (got - expected).abs() < TOLERANCE,
                "{name}, id {id}: {got} against {expected}"
            );
        }
    }
}
