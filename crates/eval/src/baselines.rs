//! What models reach that only count: a trained one must be clearly below them.

use corpus::examples::SourceExample;
use corpus::split::Side;

use crate::Sample;
use crate::metric::char_ngram::CharNgram;
use crate::metric::{loss_gap, unigram};
use crate::report::Baseline;
use crate::samples::sample;
use crate::score::Score;

/// Counting models see what training saw: the train side of these rows, the character 5-gram also the `read` texts of the stages before.
pub(crate) fn baselines(
    rows: &[SourceExample],
    read: &[String],
    vocab_size: usize,
) -> Vec<Baseline> {
    let all: Vec<Sample> = rows.iter().filter_map(sample).collect();
    let held_out =
        |scores: &[Score]| loss_gap::Loss::of(&all, scores, |sample| sample.side == Side::Val);
    let tokens = held_out(&unigram::scores(&all, vocab_size));
    let train = all.iter().filter(|sample| sample.side == Side::Train);
    let model = CharNgram::train(
        train
            .map(|sample| sample.text.as_str())
            .chain(read.iter().map(String::as_str)),
    );
    let (mut nll, mut bytes) = (0.0, 0);
    for sample in all.iter().filter(|sample| sample.side == Side::Val) {
        nll += model.nll(&sample.text);
        bytes += sample.text.len();
    }
    vec![
        Baseline {
            name: "token unigram",
            nats_per_token: Some(tokens.nats_per_token),
            bits_per_byte: tokens.bits_per_byte,
        },
        Baseline {
            name: "character 5-gram",
            nats_per_token: None,
            bits_per_byte: nll / std::f64::consts::LN_2 / bytes.max(1) as f64,
        },
    ]
}
