//! Two models on the same texts: how far their losses are apart, scene by scene, so that what a scene is worth cancels out.

use std::collections::BTreeMap;

use serde::Serialize;

use super::loss_gap::SplitMix;
use crate::Sample;
use crate::score::Score;

/// The loss of one model less that of another on the same samples, in nats a token: below 0 the first is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Difference {
    /// The mean over all predicted tokens.
    pub nats_per_token: f64,
    /// 95 % interval: bootstrap over scenes.
    pub low: f64,
    /// Its other end.
    pub high: f64,
}

/// `scores` less `others`, both of `samples` in order; NaN (in JSON: null) without a predicted token.
pub fn between(samples: &[Sample], scores: &[Score], others: &[Score]) -> Difference {
    const DRAWS: usize = 1000;
    // 1. sums by scene, the unit of independence
    let mut by_scene: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for (sample, (score, other)) in samples.iter().zip(scores.iter().zip(others)) {
        let (nll, tokens) = by_scene.entry(&sample.scene).or_default();
        *nll += score.nll - other.nll;
        *tokens += score.tokens;
    }
    let scenes: Vec<(f64, usize)> = by_scene.into_values().collect();
    let mean = |scenes: &mut dyn Iterator<Item = (f64, usize)>| {
        let (nll, tokens) = scenes.fold((0.0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        nll / tokens as f64
    };
    // 2. draws of as many scenes, with repeats
    let mut random = SplitMix(0x5EED);
    let mut draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let drawn =
                (0..scenes.len()).map(|_| scenes[(random.next() % scenes.len() as u64) as usize]);
            mean(&mut drawn.into_iter())
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    Difference {
        nats_per_token: mean(&mut scenes.iter().copied()),
        low: draws[DRAWS * 25 / 1000],
        high: draws[DRAWS * 975 / 1000 - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use corpus::Side;
    use text::Example;

    fn samples(n: usize) -> Vec<Sample> {
        (0..n)
            .map(|i| Sample {
                // Two languages a scene.
                scene: format!("s{}", i / 2),
                language: String::new(),
                side: Side::Val,
                encoded: Example::document(vec![], vec![]),
                bytes: 10,
                text: String::new(),
            })
            .collect()
    }

    /// Scenes of very different losses, of which the second model has a little more everywhere.
    #[test]
    fn what_scenes_are_worth_cancels_out() {
        let samples = samples(40);
        let score = |i: usize, more: f64| Score {
            nll: 10.0 * (i / 2) as f64 + more,
            tokens: 10,
        };
        let low: Vec<Score> = (0..40).map(|i| score(i, 0.0)).collect();
        let high: Vec<Score> = (0..40)
            .map(|i| score(i, if i % 4 == 0 { 0.05 } else { 0.15 }))
            .collect();
        let difference = between(&samples, &high, &low);
        assert!((difference.nats_per_token - 0.0125).abs() < 1e-12);
        assert!(difference.low > 0.0 && difference.low < 0.0125);
        assert!(difference.high > 0.0125 && difference.high < 0.02);
        let back = between(&samples, &low, &high);
        assert!((back.nats_per_token + 0.0125).abs() < 1e-12 && back.high < 0.0);
        assert_eq!(between(&samples, &low, &low).high, 0.0);
        assert_eq!(between(&samples, &high, &low), difference);
    }

    #[test]
    fn without_a_token_there_is_no_difference() {
        let none = between(&[], &[], &[]);
        assert!(none.nats_per_token.is_nan() && none.low.is_nan());
    }
}
