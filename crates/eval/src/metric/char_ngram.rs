//! A character 5-gram model with Witten-Bell smoothing: the honest rival of a small neural model on little text.

use std::collections::HashMap;

/// Longest context, in characters.
const ORDER: usize = 4;
/// End of text; no text holds it.
const END: char = '\u{0}';

/// Counts of every context up to [`ORDER`] characters.
#[derive(Debug, Default)]
pub struct CharNgram {
    contexts: HashMap<Vec<char>, Context>,
    alphabet: HashMap<char, ()>,
}

#[derive(Debug, Default)]
struct Context {
    total: u64,
    next: HashMap<char, u64>,
}

impl CharNgram {
    /// Counts `texts`; each ends with an end mark.
    pub fn train<'a>(texts: impl IntoIterator<Item = &'a str>) -> Self {
        let mut model = CharNgram::default();
        for text in texts {
            let chars: Vec<char> = text.chars().chain([END]).collect();
            for (at, &c) in chars.iter().enumerate() {
                model.alphabet.insert(c, ());
                for order in 0..=ORDER.min(at) {
                    let context = model
                        .contexts
                        .entry(chars[at - order..at].to_vec())
                        .or_default();
                    context.total += 1;
                    *context.next.entry(c).or_default() += 1;
                }
            }
        }
        model
    }

    /// -ln P(text and its end). A character never seen costs the uniform share of one more symbol than the alphabet has,
    /// and then its own choice among all of Unicode's assigned planes (ln 150,000).
    pub fn nll(&self, text: &str) -> f64 {
        let chars: Vec<char> = text.chars().chain([END]).collect();
        let uniform = 1.0 / (self.alphabet.len() + 1) as f64;
        (0..chars.len())
            .map(|at| {
                let mut p = uniform;
                for order in 0..=ORDER.min(at) {
                    let Some(context) = self.contexts.get(&chars[at - order..at]) else {
                        break;
                    };
                    let (total, kinds) = (context.total as f64, context.next.len() as f64);
                    let count = context.next.get(&chars[at]).copied().unwrap_or(0) as f64;
                    p = (count + kinds * p) / (total + kinds);
                }
                let unseen = if self.alphabet.contains_key(&chars[at]) {
                    0.0
                } else {
                    150_000f64.ln()
                };
                unseen - p.ln()
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_of_a_context_sum_to_one() {
        let model = CharNgram::train(["abab", "abba"]);
        // over the alphabet {a, b, END} and one unseen symbol, after "ab": P = exp(nll(text)) stepwise
        let start = |text: &str| {
            let chars: Vec<char> = text.chars().collect();
            let with_end = model.nll(text);
            let uniform = 1.0 / 4.0;
            let mut p = uniform;
            for order in 0..=ORDER.min(chars.len()) {
                let Some(context) = model.contexts.get(&chars[chars.len() - order..]) else {
                    break;
                };
                let count = context.next.get(&END).copied().unwrap_or(0) as f64;
                let kinds = context.next.len() as f64;
                p = (count + kinds * p) / (context.total as f64 + kinds);
            }
            with_end + p.ln()
        };
        // nll("ab" + x) without the end, for x over the alphabet
        let prefix = start("ab");
        let mut sum: f64 = ["aba", "abb"]
            .iter()
            .map(|t| (prefix - start(t)).exp())
            .sum();
        sum += (prefix - model.nll("ab")).exp();
        let unseen = (prefix - start("abz") + 150_000f64.ln()).exp();
        assert!((sum + unseen - 1.0).abs() < 1e-9, "{sum} + {unseen}");
    }

    #[test]
    fn seen_text_is_cheaper_than_its_reverse() {
        let model = CharNgram::train(["the ferry crosses at dusk", "the ferry waits at dawn"]);
        assert!(model.nll("the ferry waits at dusk") < model.nll("ksud ta stiaw yrref eht"));
    }
}
