//! Held-out loss against a train probe: by language, in nats a token and bits a byte, with the gap and its red flag.
//!
//! The gap of a model on unequal texts can come from the texts alone; dividing by the base model's gap removes that (`gap_over_base`).

use serde::Serialize;

use crate::score::Score;
use corpus::Side;

use crate::Sample;

/// The gap above which a model is flagged as overfitted.
pub const RED_FLAG: f64 = 0.10;

/// Summed losses of a group of samples.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Loss {
    /// Samples, those without a predicted token among them.
    pub rows: usize,
    /// Predicted tokens, end tokens among them.
    pub tokens: usize,
    /// UTF-8 bytes of the text behind them.
    pub bytes: usize,
    /// Sum of the losses / `tokens`.
    pub nats_per_token: f64,
    /// Sum of the losses / ln 2 / `bytes`: comparable between tokenizers.
    pub bits_per_byte: f64,
}

impl Loss {
    /// Sums over the samples that `keep` lets through.
    pub fn of(samples: &[Sample], scores: &[Score], keep: impl Fn(&Sample) -> bool) -> Self {
        let mut loss = Loss::default();
        let mut nll = 0.0;
        for (sample, score) in samples
            .iter()
            .zip(scores)
            .filter(|(sample, _)| keep(sample))
        {
            loss.rows += 1;
            loss.tokens += score.tokens;
            loss.bytes += sample.bytes;
            nll += score.nll;
        }
        loss.nats_per_token = nll / loss.tokens.max(1) as f64;
        loss.bits_per_byte = nll / std::f64::consts::LN_2 / loss.bytes.max(1) as f64;
        loss
    }
}

/// One language's line (or `all`).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Gap {
    /// Its code, or `all`.
    pub language: String,
    /// On rows that were trained on, as long as the held-out ones.
    pub train_probe: Loss,
    /// On the side `val`.
    pub held_out: Loss,
    /// held-out / train probe - 1, in nats a token; NaN (in JSON: null) without a train probe.
    pub gap: f64,
    /// 95 % interval of `gap`: bootstrap over scenes.
    pub gap_low: f64,
    /// Its other end.
    pub gap_high: f64,
    /// Above [`RED_FLAG`].
    pub red_flag: bool,
}

/// `all` first, then each language that has held-out rows, in order of first appearance.
pub fn by_language(samples: &[Sample], scores: &[Score]) -> Vec<Gap> {
    let mut languages: Vec<&str> = Vec::new();
    for sample in samples {
        if sample.side == Side::Val && !languages.contains(&sample.language.as_str()) {
            languages.push(&sample.language);
        }
    }
    let mut gaps = vec![line("all", samples, scores, |_| true)];
    if languages.len() > 1 {
        gaps.extend(languages.iter().map(|&language| {
            line(language, samples, scores, |sample| {
                sample.language == language
            })
        }));
    }
    gaps
}

fn line(name: &str, samples: &[Sample], scores: &[Score], keep: impl Fn(&Sample) -> bool) -> Gap {
    let train_probe = Loss::of(samples, scores, |s| keep(s) && s.side == Side::Train);
    let held_out = Loss::of(samples, scores, |s| keep(s) && s.side == Side::Val);
    let gap = match train_probe.tokens {
        0 => f64::NAN,
        _ => held_out.nats_per_token / train_probe.nats_per_token - 1.0,
    };
    let (gap_low, gap_high) = bootstrap(samples, scores, &keep);
    Gap {
        language: name.to_owned(),
        train_probe,
        held_out,
        gap,
        gap_low,
        gap_high,
        red_flag: gap > RED_FLAG,
    }
}

/// One language's losses (or those of `all`) on every held-out side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SideLosses {
    /// Its code, or `all`.
    pub language: String,
    /// Scenes held out in all languages.
    pub val: Loss,
    /// Whole missions held out, with what retells them.
    pub val_strict: Option<Loss>,
    /// Scenes held out in this language alone.
    pub probe_x: Option<Loss>,
    /// bits a byte of `val` - bits a byte of `probe-x`, between rows of the same length: what the other translations taught.
    pub transfer: Option<f64>,
}

/// `all` first, then each language, in order of first appearance; none if nothing but `val` is held out.
pub fn by_side(samples: &[Sample], scores: &[Score]) -> Vec<SideLosses> {
    let is_other = |sample: &Sample| matches!(sample.side, Side::ValStrict | Side::ProbeX);
    if !samples.iter().any(is_other) {
        return Vec::new();
    }
    let mut languages: Vec<&str> = Vec::new();
    for sample in samples.iter().filter(|s| s.side != Side::Train) {
        if !languages.contains(&sample.language.as_str()) {
            languages.push(&sample.language);
        }
    }
    let line = |language: Option<&str>| {
        let keep = |s: &Sample| language.is_none_or(|language| s.language == language);
        let on = |side| Loss::of(samples, scores, |s| keep(s) && s.side == side);
        let some = |side| Some(on(side)).filter(|loss: &Loss| loss.rows > 0);
        SideLosses {
            language: language.unwrap_or("all").to_owned(),
            val: on(Side::Val),
            val_strict: some(Side::ValStrict),
            probe_x: some(Side::ProbeX),
            transfer: transfer(samples, scores, &keep),
        }
    };
    let all = std::iter::once(line(None));
    if languages.len() > 1 {
        all.chain(languages.iter().map(|l| line(Some(l)))).collect()
    } else {
        all.collect()
    }
}

/// Mean over languages and lengths (powers of two of bytes) of bits a byte (val) - bits a byte (probe-x), weighted by the probe's
/// bytes; None if no length of a language is on both sides.
fn transfer(samples: &[Sample], scores: &[Score], keep: &impl Fn(&Sample) -> bool) -> Option<f64> {
    #[derive(Default)]
    struct Cell {
        nll: [f64; 2],
        bytes: [usize; 2],
    }
    let mut cells: std::collections::BTreeMap<(&str, u32), Cell> = Default::default();
    for (sample, score) in samples.iter().zip(scores) {
        let side = match sample.side {
            Side::Val => 0,
            Side::ProbeX => 1,
            _ => continue,
        };
        if keep(sample) && sample.bytes > 0 {
            let cell = cells
                .entry((&sample.language, sample.bytes.ilog2()))
                .or_default();
            cell.nll[side] += score.nll;
            cell.bytes[side] += sample.bytes;
        }
    }
    let (mut sum, mut weight) = (0.0, 0.0);
    for cell in cells.values().filter(|cell| !cell.bytes.contains(&0)) {
        let bits = |side: usize| cell.nll[side] / std::f64::consts::LN_2 / cell.bytes[side] as f64;
        sum += cell.bytes[1] as f64 * (bits(0) - bits(1));
        weight += cell.bytes[1] as f64;
    }
    (weight > 0.0).then(|| sum / weight)
}

/// 2.5 % and 97.5 % quantiles of the gap over 1000 draws of whole scenes, seeded.
fn bootstrap(samples: &[Sample], scores: &[Score], keep: &impl Fn(&Sample) -> bool) -> (f64, f64) {
    const DRAWS: usize = 1000;
    let scenes = |side: Side| {
        let mut by_scene: std::collections::BTreeMap<&str, (f64, usize)> = Default::default();
        for (sample, score) in samples
            .iter()
            .zip(scores)
            .filter(|(s, _)| keep(s) && s.side == side)
        {
            let entry = by_scene.entry(&sample.scene).or_default();
            entry.0 += score.nll;
            entry.1 += score.tokens;
        }
        by_scene.into_values().collect::<Vec<_>>()
    };
    let (train, held_out) = (scenes(Side::Train), scenes(Side::Val));
    if train.is_empty() || held_out.is_empty() {
        return (f64::NAN, f64::NAN);
    }
    let mut random = SplitMix(0x5EED);
    let mut mean = |side: &[(f64, usize)]| {
        let (mut nll, mut tokens) = (0.0, 0);
        for _ in 0..side.len() {
            let (n, t) = side[(random.next() % side.len() as u64) as usize];
            nll += n;
            tokens += t;
        }
        nll / tokens.max(1) as f64
    };
    let mut gaps: Vec<f64> = (0..DRAWS)
        .map(|_| mean(&held_out) / mean(&train) - 1.0)
        .collect();
    gaps.sort_by(f64::total_cmp);
    (gaps[DRAWS * 25 / 1000], gaps[DRAWS * 975 / 1000 - 1])
}

/// SplitMix64: a seed, a stream; enough for a bootstrap. That of `kernel::random` is no different, but metrics know no kernel.
pub(super) struct SplitMix(pub u64);

impl SplitMix {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use text::Example;

    fn sample(scene: &str, language: &str, side: Side, bytes: usize) -> Sample {
        Sample {
            scene: scene.into(),
            language: language.into(),
            side,
            encoded: Example::document(vec![], vec![]),
            bytes,
            text: String::new(),
        }
    }

    #[test]
    fn gap_is_held_out_over_probe() {
        let samples = [
            sample("a", "en", Side::Train, 40),
            sample("b", "en", Side::Val, 40),
            sample("a", "jp", Side::Train, 40),
            sample("b", "jp", Side::Val, 20),
        ];
        let score = |nll| Score { nll, tokens: 10 };
        let gaps = by_language(
            &samples,
            &[score(20.0), score(21.0), score(20.0), score(30.0)],
        );
        let names: Vec<&str> = gaps.iter().map(|g| g.language.as_str()).collect();
        assert_eq!(names, ["all", "en", "jp"]);
        assert!((gaps[1].gap - 0.05).abs() < 1e-12 && !gaps[1].red_flag);
        assert!((gaps[2].gap - 0.5).abs() < 1e-12 && gaps[2].red_flag);
        assert!((gaps[0].gap - (51.0 / 40.0 - 1.0)).abs() < 1e-12);
        let bits = 30.0 / std::f64::consts::LN_2 / 20.0;
        assert!((gaps[2].held_out.bits_per_byte - bits).abs() < 1e-12);
    }

    #[test]
    fn sides_stand_beside_each_other_and_transfer_compares_equal_lengths() {
        let samples = [
            sample("a", "en", Side::Val, 40),
            sample("b", "en", Side::Val, 400),
            sample("c", "en", Side::ProbeX, 50),
            sample("d", "en", Side::ValStrict, 40),
            sample("e", "en", Side::Train, 40),
        ];
        let ln2 = std::f64::consts::LN_2;
        let score = |bits: f64| Score {
            nll: bits * ln2,
            tokens: 10,
        };
        let scores = [80.0, 4000.0, 75.0, 120.0, 1.0].map(score);
        let lines = by_side(&samples, &scores);
        assert_eq!(lines.len(), 1, "one language is all");
        // 80 / 40 against 75 / 50; the long row has no counterpart.
        assert!((lines[0].transfer.unwrap() - 0.5).abs() < 1e-12);
        let bits = |loss: Option<Loss>| loss.unwrap().bits_per_byte;
        assert!((bits(lines[0].val_strict) - 3.0).abs() < 1e-12);
        assert!((bits(lines[0].probe_x) - 1.5).abs() < 1e-12);
        // Neither the gap nor its probe see the other sides.
        assert_eq!(by_language(&samples, &scores)[0].held_out.rows, 2);
        assert_eq!(by_side(&samples[..2], &scores[..2]), []);
        assert_eq!(by_side(&samples[2..], &scores[2..])[0].transfer, None);
    }

    #[test]
    fn bootstrap_interval_holds_the_gap_and_repeats() {
        let samples: Vec<Sample> = (0..40)
            .map(|i| {
                sample(
                    &format!("s{i}"),
                    "en",
                    if i % 2 == 0 { Side::Train } else { Side::Val },
                    10,
                )
            })
            .collect();
        let scores: Vec<Score> = (0..40)
            .map(|i| Score {
                nll: 20.0 + (i % 7) as f64,
                tokens: 10,
            })
            .collect();
        let first = by_language(&samples, &scores);
        assert!(first[0].gap_low <= first[0].gap && first[0].gap <= first[0].gap_high);
        assert_eq!(first, by_language(&samples, &scores));
    }
}
