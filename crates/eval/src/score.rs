//! Token losses of samples under a model: cut and packed as training cuts and packs, never seeing each other.

use model::{Batch, Model, Saved};
use text::Tokenizer;
use text::pack::{self, Packing};

use crate::{Result, Sample};

/// Sum of token losses (nats) and number of predicted tokens of one sample.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Score {
    /// Sum over the predicted tokens.
    pub nll: f64,
    /// How many these are.
    pub tokens: usize,
}

/// Scores every sample, in order, in rows of at most `row_tokens` tokens; what is longer is cut as [`pack::split`] does, and its pieces'
/// losses are added. `progress` hears how many samples are done.
///
/// # Errors
/// A sample that no row has room for; whatever the model's forward pass reports (a token id beyond the vocabulary, above all).
pub fn samples(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    samples: &[Sample],
    row_tokens: usize,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Score>> {
    let examples = samples.iter().map(|sample| &sample.encoded);
    let pieces = pack::pieces(tokenizer, examples, row_tokens)?;
    let mut scores = vec![Score::default(); samples.len()];
    let mut saved = Saved::forward_only(model.config());
    for row in pack::rows(&pieces, row_tokens, Packing::Sequential)? {
        let nll_t = model.nll(
            &mut saved,
            &Batch {
                tokens_t: &row.tokens_t,
                targets_t: &row.targets_t,
                cu_seqlens: &row.cu_seqlens,
            },
        )?;
        for (bounds, &example_idx) in row.cu_seqlens.windows(2).zip(&row.examples) {
            let piece = bounds[0] as usize..bounds[1] as usize;
            let score = &mut scores[example_idx];
            score.nll += nll_t[piece.clone()]
                .iter()
                .map(|&x| f64::from(x))
                .sum::<f64>();
            let targets = row.targets_t[piece].iter();
            score.tokens += targets.filter(|&&target| target >= 0).count();
        }
        progress(row.examples.last().map_or(0, |last| last + 1));
    }
    progress(samples.len());
    Ok(scores)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use corpus::Side;
    use kernel::DType;
    use model::Config;
    use text::Example;

    use super::*;

    /// Of a loss: f32 products are summed in another order where rows are of other lengths.
    const RELATIVE: f64 = 1e-4;

    /// A layer of each kind, 61 ids.
    fn tiny() -> Model {
        let json = serde_json::json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "model_type": "qwen3_5",
            "dtype": "float32",
            "tie_word_embeddings": true,
            "text_config": {
                "model_type": "qwen3_5_text",
                "dtype": "float32",
                "vocab_size": 61,
                "hidden_size": 24,
                "intermediate_size": 40,
                "num_hidden_layers": 2,
                "layer_types": ["linear_attention", "full_attention"],
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_num_value_heads": 4,
                "linear_value_head_dim": 8,
                "initializer_range": 0.2,
                "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
            }
        });
        Model::init(Config::from_json(&json).unwrap(), 5, DType::F32)
    }

    fn sample(encoded: Example) -> Sample {
        Sample {
            scene: String::new(),
            language: "en".to_owned(),
            side: Side::Val,
            encoded,
            bytes: 0,
            text: String::new(),
        }
    }

    /// `n` tokens of a text of its own, all but the first predicted.
    fn document(n: u32) -> Sample {
        let ids: Vec<u32> = (0..n).map(|t| (t * t + 7 * t + n) % 61).collect();
        let mut labels: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        labels[0] = text::IGNORE;
        sample(Example::document(ids, labels))
    }

    fn assert_close(what: &str, got: f64, expected: f64) {
        assert!(
            (got - expected).abs() < RELATIVE * expected,
            "{what}: {got}, not {expected}"
        );
    }

    #[test]
    fn samples_score_packed_and_cut_as_their_pieces_do_alone() {
        let model = tiny();
        let documents = [5, 40, 9].map(document);
        let score = |samples: &[Sample], row_tokens| {
            super::samples(&model, None, samples, row_tokens, |_| {}).unwrap()
        };
        let alone = |sample: &Sample| score(from_ref(sample), 64)[0];

        // 1. in one row none sees another
        let packed = score(&documents, 64);
        for (score, sample) in packed.iter().zip(&documents) {
            assert_eq!(score.tokens as u64, sample.encoded.n_targets());
            assert_close("packed", score.nll, alone(sample).nll);
        }

        // 2. the long one is cut, and its pieces' losses are added
        let cut = score(&documents, 16);
        let tokens = |scores: &[Score]| -> Vec<usize> { scores.iter().map(|s| s.tokens).collect() };
        assert_eq!(tokens(&cut), tokens(&packed));
        for short in [0, 2] {
            assert_close("short", cut[short].nll, packed[short].nll);
        }
        let pieces = pack::split(None, &documents[1].encoded, 16).unwrap();
        assert!(pieces.len() > 2);
        let of_pieces: f64 = pieces
            .into_iter()
            .map(|piece| alone(&sample(piece)).nll)
            .sum();
        assert_close("cut", cut[1].nll, of_pieces);
    }

    #[test]
    fn progress_ends_with_all_samples() {
        let documents = [12, 12, 12].map(document);
        let mut heard = Vec::new();
        samples(&tiny(), None, &documents, 16, |done| heard.push(done)).unwrap();
        assert_eq!(heard, [1, 2, 3, 3]);
    }
}
