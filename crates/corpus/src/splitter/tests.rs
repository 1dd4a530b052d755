//! What the sides keep apart, on small stories told in the tests.

use super::*;

/// Units with their texts by language.
struct Told {
    units: Vec<Unit>,
    texts: Vec<(usize, Language, String)>,
}

impl Splittable for Told {
    fn units(&self) -> &[Unit] {
        &self.units
    }

    fn with_texts<R>(
        &self,
        language: Language,
        f: impl FnOnce(&[UnitText<'_>]) -> Result<R>,
    ) -> Result<R> {
        let of_language = self.texts.iter().filter(|t| t.1 == language);
        let texts = of_language.map(|(unit, _, text)| UnitText {
            unit: *unit,
            text,
            hash: Some(4711),
        });
        let mut texts: Vec<_> = texts.collect();
        texts.sort_by_key(|t| t.unit);
        f(&texts)
    }
}

impl Told {
    /// `n` scenes of two chapters, missions of five, nothing told twice; the character speaks in two of three.
    fn scenes(n: usize) -> Told {
        let mut told = Told {
            units: Vec::new(),
            texts: Vec::new(),
        };
        for i in 0..n {
            let chapter = if i < n / 2 { "one" } else { "two" };
            told.units.push(Unit {
                id: format!("s{i:03}"),
                stratum: chapter.to_owned(),
                mission: Some(format!("m{:02}", i / 5)),
                n_own_lines: i % 3,
                n_lines: 5,
            });
            for language in [Language::Chs, Language::En, Language::Jp] {
                told.tell(i, language, &sentence(i, language));
            }
        }
        told
    }

    fn tell(&mut self, unit: usize, language: Language, text: &str) {
        self.texts.push((unit, language, text.to_owned()));
    }

    fn split(&self, seed: u64) -> Split {
        let options = SplitOptions {
            seed,
            ..SplitOptions::default()
        };
        make(self, options, origin()).unwrap()
    }
}

fn origin() -> Origin {
    Origin {
        source_sha256: String::new(),
        source_files: SourceFiles::new(),
        character_sha256: String::new(),
        languages: Language::ALL.to_vec(),
    }
}

/// Sixty letters that no other scene and language has.
fn sentence(i: usize, language: Language) -> String {
    let mut state = (i as u64 + 1) * 1000 + language as u64;
    (0..60)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            char::from(b'a' + ((state >> 33) % 26) as u8)
        })
        .collect()
}

#[test]
fn share_is_met_in_every_stratum() {
    let split = Told::scenes(300).split(7);
    let own = |range: std::ops::Range<usize>| -> usize {
        range
            .filter(|i| split.val.contains(&format!("s{i:03}")))
            .map(|i| i % 3)
            .sum()
    };
    // 8 % of about 140 lines of the character in each chapter
    assert!((8..=14).contains(&own(0..150)), "{}", own(0..150));
    assert!((8..=14).contains(&own(150..300)), "{}", own(150..300));
}

#[test]
fn every_scene_is_on_one_side() {
    let told = Told::scenes(300);
    let split = told.split(7);
    let n = split.train.len()
        + split.val.len()
        + split.val_strict.len()
        + split.probe_x.len()
        + split.contaminated.len()
        + split.filtered.len();
    assert_eq!(n, 300);
    for side in [Side::Train, Side::Val, Side::ValStrict, Side::ProbeX] {
        assert!(split.report.sides[&side].scenes > 0, "{side}");
    }
    // Lines by language: each in one place.
    for language in [Language::Chs, Language::En, Language::Jp] {
        let lines = split
            .report
            .sides
            .values()
            .filter_map(|s| s.lines.get(&language));
        assert_eq!(lines.sum::<u64>(), 300);
    }
}

#[test]
fn seed_decides_and_nothing_else() {
    let told = Told::scenes(300);
    assert_eq!(told.split(7), told.split(7));
    let (a, b) = (told.split(7), told.split(8));
    assert_ne!(a.val, b.val);
    assert_ne!(a.val_strict, b.val_strict);
    assert_ne!(a.probe_x, b.probe_x);
}

#[test]
fn strict_missions_are_out_whole() {
    let told = Told::scenes(300);
    let split = told.split(7);
    assert!(!split.report.strict_missions.is_empty());
    for unit in &told.units {
        let mission = unit.mission.clone().unwrap();
        assert_eq!(
            split.val_strict.contains(&unit.id),
            split.report.strict_missions.contains(&mission)
        );
    }
}

#[test]
fn probes_leave_one_language_out_and_each_gets_some() {
    let split = Told::scenes(300).split(7);
    for language in [Language::Chs, Language::En, Language::Jp] {
        let n = split.probe_x.values().filter(|l| **l == language).count();
        assert!(n >= 4, "{language}: {n} of {}", split.probe_x.len());
    }
    let (scene, out) = split.probe_x.iter().next().unwrap();
    let trained = Language::ALL
        .iter()
        .filter(|l| split.side(scene, Some(**l)) == Some(Side::Train));
    assert_eq!(trained.count(), 12);
    assert_eq!(split.side(scene, Some(*out)), Some(Side::ProbeX));
}

#[test]
fn small_story_has_no_strict_side_and_no_probes_and_says_so() {
    let split = Told::scenes(60).split(7);
    assert!(split.val_strict.is_empty() && split.probe_x.is_empty());
    assert!(!split.val.is_empty());
    assert_eq!(
        split.report.notes,
        [
            "no val-strict: the story has 12 missions or chapters, and 20 are needed",
            "no probe-x: about 6 scenes for 3 languages, and 24 are needed"
        ]
    );
}

#[test]
fn shared_text_keeps_scenes_together() {
    for seed in 0..20 {
        let mut told = Told::scenes(300);
        // The same but for case and punctuation, in one language of three.
        told.tell(3, Language::En, "We are vanquished");
        told.tell(150, Language::En, " we are - vanquished!");
        told.tell(4, Language::En, "short");
        let split = told.split(seed);
        let of_mission =
            |id: &str| split.val_strict.contains(id) || split.filtered.contains_key(id);
        for language in [Language::Chs, Language::En] {
            let side = |id| split.side(id, Some(language));
            let together = side("s003") == side("s150");
            assert!(
                together || (of_mission("s003") && of_mission("s150")),
                "{seed}"
            );
        }
        assert_eq!(split.report.ties_by_text, 1);
    }
}

#[test]
fn component_too_large_for_the_share_stays_in_training() {
    let mut told = Told::scenes(300);
    for i in 0..90 {
        told.tell(i, Language::En, "we are vanquished");
    }
    let split = told.split(7);
    let held_out = |i: usize| {
        let side = split.side(&format!("s{i:03}"), Some(Language::En));
        side.is_some_and(Side::is_held_out)
    };
    assert!(!(0..90).any(held_out));
    assert!(!split.val.is_empty());
    assert_eq!(split.report.largest_component, 90);
}

#[test]
fn retelling_of_a_strict_mission_is_filtered_with_the_rules_name() {
    let mut told = Told::scenes(300);
    let strict = told.split(7).val_strict.iter().next().unwrap().clone();
    let place = told.units.iter().position(|u| u.id == strict).unwrap();
    told.units.push(Unit {
        id: "wiki".to_owned(),
        stratum: "wiki".to_owned(),
        mission: None,
        n_own_lines: 0,
        n_lines: 2,
    });
    // A paragraph of its own and then the scene, in one language.
    told.tell(300, Language::Chs, &sentence(900, Language::Chs));
    let begin = sentence(901, Language::En) + &sentence(902, Language::En);
    told.tell(300, Language::En, &begin);
    let page = format!("As they tell it: {}", sentence(place, Language::En));
    told.tell(300, Language::En, &page);
    let split = told.split(7);
    assert!(split.val_strict.contains(&strict));
    assert_eq!(
        split.side("wiki", Some(Language::Chs)),
        Some(Side::Filtered)
    );
    assert_eq!(split.rule("wiki"), Some(RETELLS));
}

#[test]
fn held_out_copy_of_training_text_is_contaminated() {
    let mut told = Told::scenes(300);
    let split = told.split(7);
    let (val, train) = (
        split.val.iter().next().unwrap().clone(),
        split.train.iter().next().unwrap().clone(),
    );
    let place = |id: &str| told.units.iter().position(|u| u.id == id).unwrap();
    let line = sentence(901, Language::En) + &sentence(902, Language::En);
    let (val_place, train_place) = (place(&val), place(&train));
    told.tell(val_place, Language::En, &line);
    let longer = format!(
        "{} {line} {}",
        sentence(903, Language::En),
        sentence(904, Language::En)
    );
    told.tell(train_place, Language::En, &longer);
    let split = told.split(7);
    assert_eq!(
        split.side(&val, Some(Language::Chs)),
        Some(Side::Contaminated)
    );
    assert_eq!(split.side(&train, Some(Language::Chs)), Some(Side::Train));
}

fn check(told: &Told, split: &Split) -> Result<()> {
    guard(told, Path::new("told"), split, &[])
}

#[test]
fn guard_names_both_scenes_and_the_hash_of_a_text_on_two_sides() {
    let mut told = Told::scenes(300);
    let mut split = told.split(7);
    // A doctored split: two scenes that share a text, on two sides.
    told.tell(0, Language::Jp, "eleven char");
    told.tell(1, Language::Jp, "eleven char");
    let train: BTreeSet<String> = told.units.iter().map(|u| u.id.clone()).collect();
    split.val = BTreeSet::from(["s001".to_owned()]);
    split.train = train.difference(&split.val).cloned().collect();
    split.val_strict.clear();
    split.probe_x.clear();
    check(&told, &split).unwrap();
    told.tell(0, Language::Jp, "twelve chars");
    told.tell(1, Language::Jp, "twelve chars");
    let error = check(&told, &split).unwrap_err().to_string();
    assert!(
        error.starts_with(
            "the text `twelve chars` (jp, hash 4711) stands in s001 (held out) and in s000 (training)"
        ),
        "{error}"
    );
    // The other held-out sides are guarded as well, a probe in its language only.
    split.val.clear();
    split.val_strict.insert("s001".to_owned());
    check(&told, &split).unwrap_err();
    split.val_strict.clear();
    split.probe_x.insert("s001".to_owned(), Language::En);
    check(&told, &split).unwrap();
    split.probe_x.insert("s001".to_owned(), Language::Jp);
    check(&told, &split).unwrap_err();
}
