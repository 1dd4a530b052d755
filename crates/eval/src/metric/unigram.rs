//! The token-unigram model: what a model knows that has only counted. A trained model must be clearly below it.

use crate::score::Score;
use corpus::Side;

use crate::Sample;

/// Scores every sample with add-one smoothed frequencies of the targets on the train side.
pub fn scores(samples: &[Sample], vocab_size: usize) -> Vec<Score> {
    let mut counts = vec![1u64; vocab_size];
    let mut total = vocab_size as u64;
    let targets = |sample: &Sample| {
        let labels = sample.encoded.labels.iter().skip(1);
        labels
            .filter(|&&label| label >= 0)
            .map(|&label| label as usize)
            .collect::<Vec<_>>()
    };
    for sample in samples.iter().filter(|s| s.side == Side::Train) {
        for id in targets(sample) {
            counts[id] += 1;
            total += 1;
        }
    }
    let nll = |id: usize| -(counts[id] as f64 / total as f64).ln();
    samples
        .iter()
        .map(|sample| {
            let ids = targets(sample);
            Score {
                nll: ids.iter().map(|&id| nll(id)).sum(),
                tokens: ids.len(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use text::Example;

    #[test]
    fn unigram_counts_the_train_side_only() {
        let sample = |side, labels: &[i32]| Sample {
            scene: String::new(),
            language: "en".into(),
            side,
            encoded: Example::document(vec![0; labels.len()], labels.to_vec()),
            bytes: 0,
            text: String::new(),
        };
        let samples = [
            sample(Side::Train, &[-100, 1, 1, 1]),
            sample(Side::Val, &[-100, 1, 2]),
        ];
        let scores = scores(&samples, 3);
        // counts 1, 4, 1 of 6
        let expected = -(4.0f64 / 6.0).ln() - (1.0f64 / 6.0).ln();
        assert!((scores[1].nll - expected).abs() < 1e-12);
        assert_eq!(scores[1].tokens, 2);
    }
}
