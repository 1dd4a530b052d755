//! Rows as metrics take them: all that is held out, and as many train rows like them.

use std::collections::{BTreeMap, BTreeSet};

use corpus::examples::SourceExample;
use corpus::split::Side;
use text::probe::{Kind, matched};

use crate::Sample;
use crate::trained_rows::TrainedRows;

/// Every held-out row, and for each of side `val` a train row of the same language and nearly the same length, ties broken by seed, from
/// those that were trained on. Languages of which `trained` has no row take any of the train side; they are named.
pub(crate) fn samples(
    rows: &[SourceExample],
    trained: Option<&TrainedRows>,
    seed: u64,
) -> (Vec<Sample>, Vec<String>) {
    let mut out: Vec<Sample> = rows
        .iter()
        .filter(|row| row.side.is_held_out())
        .filter_map(sample)
        .collect();
    // 1. by language the train side, and the part of it that was trained on
    let mut side: BTreeMap<String, (Vec<&SourceExample>, Vec<&SourceExample>)> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.side == Side::Train) {
        let language = row.encoded.origin.language.clone().unwrap_or_default();
        let (all, known) = side.entry(language).or_default();
        all.push(row);
        if trained.is_some_and(|trained| trained.contains(&row.encoded.input_ids)) {
            known.push(row);
        }
    }
    // 2. what can be drawn, shuffled by seed
    let val = || rows.iter().filter(|row| row.side == Side::Val);
    let wanted: BTreeSet<&str> = val()
        .map(|row| row.encoded.origin.language.as_deref().unwrap_or_default())
        .collect();
    let mut not_recorded = Vec::new();
    let mut candidates = Vec::new();
    for (language, (all, known)) in side {
        if known.is_empty() && wanted.contains(language.as_str()) {
            candidates.extend(all);
            not_recorded.push(language);
        } else {
            candidates.extend(known);
        }
    }
    candidates.sort_by_cached_key(|row| {
        let scene = row.scene.as_deref().unwrap_or("");
        files::sha256(format!("{seed} {scene} {:?}", row.encoded.origin.language).as_bytes())
    });
    // 3. one for each held-out row
    let probe = matched(val().map(kind), candidates.iter().copied().map(kind));
    out.extend(
        probe
            .into_iter()
            .filter_map(|place| sample(candidates[place])),
    );
    (out, not_recorded)
}

/// What a row's probe is matched by.
fn kind(row: &SourceExample) -> Kind<'_> {
    Kind {
        language: row.encoded.origin.language.as_deref(),
        targets: row.encoded.n_targets(),
    }
}

/// A row as metrics take it; None for rows on neither side.
pub fn sample(row: &SourceExample) -> Option<Sample> {
    let is_on_a_side = row.side == Side::Train || row.side.is_held_out();
    is_on_a_side.then(|| Sample {
        scene: row.scene.clone().unwrap_or_default(),
        language: row.encoded.origin.language.clone().unwrap_or_default(),
        side: row.side,
        encoded: row.encoded.clone(),
        bytes: row.encoded.origin.bytes,
        text: row.text.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use text::{Example, WrittenTokens};

    fn row(id: u32, language: &str, side: Side) -> SourceExample {
        let mut encoded = Example::document(vec![id; 4], vec![id as i32; 4]);
        encoded.origin.language = Some(language.to_owned());
        encoded.origin.bytes = 4;
        SourceExample {
            encoded,
            scene: Some(format!("s{id}")),
            side,
            text: String::new(),
            messages: Vec::new(),
            written: WrittenTokens::default(),
        }
    }

    #[test]
    fn train_probe_is_drawn_from_rows_that_were_trained_on() {
        let mut rows: Vec<SourceExample> = (0..20).map(|id| row(id, "en", Side::Train)).collect();
        rows.extend((20..30).map(|id| row(id, "chs", Side::Train)));
        rows.extend((30..33).map(|id| row(id, "en", Side::Val)));
        rows.extend((40..42).map(|id| row(id, "chs", Side::Val)));
        let probe = |trained: Option<&TrainedRows>| -> (Vec<u32>, Vec<String>) {
            let (samples, not_recorded) = samples(&rows, trained, 7);
            let probe = samples.iter().filter(|s| s.side == Side::Train);
            let mut ids: Vec<u32> = probe.map(|s| s.encoded.input_ids[0]).collect();
            ids.sort_unstable();
            (ids, not_recorded)
        };
        let mut trained = TrainedRows::default();
        for id in [3, 5, 7, 9] {
            trained.insert(&[id; 4]);
        }
        // Three of the four English ones; of Chinese nothing is known.
        let (ids, not_recorded) = probe(Some(&trained));
        assert_eq!(ids.len(), 5);
        assert!(ids[..3].iter().all(|id| [3, 5, 7, 9].contains(id)));
        assert!(ids[3..].iter().all(|id| (20..30).contains(id)));
        assert_eq!(not_recorded, ["chs"]);
        // Without a record: any of the train side, and it is said.
        let (ids, not_recorded) = probe(None);
        assert_eq!(ids.len(), 5);
        assert_eq!(not_recorded, ["chs", "en"]);
    }

    #[test]
    fn train_probe_has_rows_as_long_as_the_held_out_ones() {
        let of_length = |id: u32, n: usize, side| SourceExample {
            encoded: Example::document(vec![id; n], vec![id as i32; n]),
            ..row(id, "en", side)
        };
        let mut rows: Vec<SourceExample> = (0..200)
            .map(|id| of_length(id, 2 + id as usize, Side::Train))
            .collect();
        rows.extend([150, 90, 151].map(|n| of_length(300 + n as u32, n, Side::Val)));
        let (samples, _) = samples(&rows, None, 7);
        let lengths: Vec<u64> = samples.iter().map(|s| s.encoded.n_targets()).collect();
        // The held-out rows, then a train row for each.
        assert_eq!(lengths, [149, 89, 150, 149, 89, 150]);
        assert!(samples[3..].iter().all(|s| s.side == Side::Train));
    }
}
