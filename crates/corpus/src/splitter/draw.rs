//! The draw: whole missions, then scenes by chapter, then one language of a scene, all in an order that depends on the seed alone.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest, Sha256};

use super::{Place, TIED, Unit};
use crate::language::Language;
use crate::split::{Side, SplitOptions, SplitReport};

/// A story of fewer missions has none to spare for `val-strict`.
const FEWEST_MISSIONS: usize = 20;
/// `probe-x` needs about so many groups of scenes in each language to say anything.
const FEWEST_PROBES: usize = 8;
/// A mission is not held out if more than this share of its lines is tied to scenes that stay in training.
const MOST_TIED_OUT: f64 = 0.2;

/// The places given so far.
pub(super) struct Draw<'u> {
    pub units: &'u [Unit],
    pub options: SplitOptions,
    /// Whether a unit has a text in any language; one that has none can be measured on nothing.
    pub is_told: Vec<bool>,
    pub places: Vec<Option<Place>>,
    pub report: SplitReport,
}

impl<'u> Draw<'u> {
    /// Whole missions, until the share of lines is met.
    pub fn strict(&mut self, groups: &[Vec<usize>]) {
        if self.options.share_strict <= 0.0 {
            return;
        }
        let mut missions: BTreeMap<&'u str, Vec<usize>> = BTreeMap::new();
        for (at, unit) in self.units.iter().enumerate() {
            if let Some(mission) = unit.mission.as_ref().filter(|_| self.is_told[at]) {
                missions.entry(mission).or_default().push(at);
            }
        }
        if missions.len() < FEWEST_MISSIONS {
            self.note(format!(
                "no val-strict: the story has {} missions or chapters, and {FEWEST_MISSIONS} are needed",
                missions.len()
            ));
            return;
        }
        let mut group_of = vec![0; self.units.len()];
        for (idx, group) in groups.iter().enumerate() {
            for unit in group {
                group_of[*unit] = idx;
            }
        }
        let mut missions: Vec<Mission<'u>> = missions
            .into_iter()
            .map(|(name, members)| Mission::new(name, members, self.units, self.options.seed))
            .collect();
        missions.sort_by_key(|m| m.order);
        for has_character in [true, false] {
            let share = self.options.share_strict
                * if has_character {
                    1.0
                } else {
                    (self.options.share_rest / self.options.share.max(f64::EPSILON)).min(1.0)
                };
            let of_kind = || missions.iter().filter(|m| m.has_character == has_character);
            let n_lines = of_kind().map(|m| m.n_lines).sum::<usize>() as f64;
            let most = (share * n_lines / 2.0).max(2.0 * n_lines / of_kind().count().max(1) as f64);
            let mut owed = share * n_lines;
            for mission in of_kind() {
                if owed <= 0.0 {
                    break;
                }
                if mission.n_lines as f64 <= most && self.can_be_out(mission, groups, &group_of) {
                    owed -= mission.n_lines as f64;
                    self.report.strict_missions.push(mission.name.to_owned());
                    for unit in &mission.members {
                        self.places[*unit] = Some(Place::On(Side::ValStrict));
                    }
                }
            }
        }
        if self.report.strict_missions.is_empty() {
            self.note(
                "no val-strict: every mission shares too much of its text with the rest".to_owned(),
            );
        }
        self.report.strict_missions.sort();
        self.settle_ties(groups);
    }

    /// Whether a mission may be held out: most of it is not tied to scenes that stay in training.
    fn can_be_out(&self, mission: &Mission<'_>, groups: &[Vec<usize>], group_of: &[usize]) -> bool {
        let members: BTreeSet<usize> = mission.members.iter().copied().collect();
        let mut touched: Vec<usize> = members.iter().map(|unit| group_of[*unit]).collect();
        touched.sort_unstable();
        touched.dedup();
        let (mut tied_out, mut taken_along) = (0, 0);
        for group in touched {
            let (inside, outside) = self.lines(&groups[group], |unit| {
                members.contains(&unit) || self.is_strict(unit)
            });
            if outside > inside {
                let own = groups[group].iter().filter(|unit| members.contains(unit));
                tied_out += own.map(|unit| self.units[*unit].n_lines).sum::<usize>();
            } else {
                taken_along += outside;
            }
        }
        let n_lines: usize = mission.members.iter().map(|m| self.units[*m].n_lines).sum();
        tied_out as f64 <= MOST_TIED_OUT * n_lines as f64 && taken_along <= n_lines
    }

    /// What is tied to a strict mission: if the mission has the larger part of a group, the rest is not trained on;
    /// if the rest is larger, the mission's part is contaminated.
    fn settle_ties(&mut self, groups: &[Vec<usize>]) {
        for group in groups {
            let (inside, outside) = self.lines(group, |unit| self.is_strict(unit));
            if inside == 0 || outside == 0 {
                continue;
            }
            for unit in group {
                if outside > inside && self.is_strict(*unit) {
                    self.places[*unit] = Some(Place::On(Side::Contaminated));
                } else if outside <= inside && !self.is_strict(*unit) {
                    self.places[*unit] = Some(Place::Filtered(TIED));
                }
            }
        }
    }

    fn is_strict(&self, unit: usize) -> bool {
        self.places[unit] == Some(Place::On(Side::ValStrict))
    }

    /// Lines of a group's units that `is_inside`, and of the others; a unit counts one at least.
    fn lines(&self, group: &[usize], is_inside: impl Fn(usize) -> bool) -> (usize, usize) {
        let mut lines = (0, 0);
        for unit in group {
            let n = self.units[*unit].n_lines.max(1);
            if is_inside(*unit) {
                lines.0 += n;
            } else {
                lines.1 += n;
            }
        }
        lines
    }

    /// Scenes in all languages, by chapter, until each has given its share.
    pub fn val(&mut self, groups: &[Vec<usize>]) {
        let free = self.free(groups);
        for has_character in [true, false] {
            let share = if has_character {
                self.options.share
            } else {
                self.options.share_rest
            };
            for group in self.drawn(&free, has_character, share, "") {
                for unit in group {
                    self.places[*unit] = Some(Place::On(Side::Val));
                }
            }
        }
    }

    /// Scenes in one language each, by chapter.
    pub fn probe(
        &mut self,
        groups: &[Vec<usize>],
        n_texts: &[(Language, Vec<u32>)],
        languages: &[Language],
    ) {
        if self.options.share_probe <= 0.0 {
            return;
        }
        let n_texts: Vec<_> = n_texts
            .iter()
            .filter(|(l, n)| languages.contains(l) && n.iter().any(|n| *n > 0))
            .collect();
        let free = self.free(groups);
        let expected = self.options.share_probe * free.len() as f64;
        let wanted = FEWEST_PROBES * n_texts.len();
        if n_texts.len() < 2 {
            self.note("no probe-x: the story has one language".to_owned());
            return;
        }
        if expected < wanted as f64 {
            self.note(format!(
                "no probe-x: about {expected:.0} scenes for {} languages, and {wanted} are needed",
                n_texts.len()
            ));
            return;
        }
        for has_character in [true, false] {
            for group in self.drawn(&free, has_character, self.options.share_probe, "probe-x") {
                // A language counts as there if it has at least half of what the best one has.
                let lines_in = |n: &[u32]| group.iter().map(|unit| n[*unit]).sum::<u32>();
                let most = n_texts.iter().map(|(_, n)| lines_in(n)).max().unwrap_or(0);
                let there: Vec<Language> = n_texts
                    .iter()
                    .filter(|(_, n)| lines_in(n) > 0 && 2 * lines_in(n) >= most)
                    .map(|(language, _)| *language)
                    .collect();
                if there.len() < 2 {
                    continue;
                }
                let digest = order(self.options.seed, "language", self.first_id(group));
                let pick = u64::from_le_bytes(digest[..8].try_into().unwrap_or_default());
                let language = there[(pick % there.len() as u64) as usize];
                for unit in group {
                    self.places[*unit] = Some(Place::Probe(language));
                }
            }
        }
    }

    /// What is left of the groups.
    fn free(&self, groups: &[Vec<usize>]) -> Vec<Vec<usize>> {
        groups
            .iter()
            .map(|group| {
                let is_free = |unit: &usize| self.places[*unit].is_none() && self.is_told[*unit];
                group.iter().copied().filter(is_free).collect()
            })
            .filter(|group: &Vec<usize>| !group.is_empty())
            .collect()
    }

    /// Draws groups until every stratum has given its share of lines. A group is drawn whatever its size, so that short
    /// and long scenes are held out alike; what a stratum gave too much, the next one gives less.
    fn drawn<'g>(
        &self,
        groups: &'g [Vec<usize>],
        has_character: bool,
        share: f64,
        purpose: &str,
    ) -> Vec<&'g [usize]> {
        struct Group<'g> {
            members: &'g [usize],
            /// Lines that count: the character's where she speaks, else everyone's.
            n_lines: usize,
            order: [u8; 32],
        }
        let mut strata: BTreeMap<&str, Vec<Group<'g>>> = BTreeMap::new();
        for members in groups {
            let sum = |lines: fn(&Unit) -> usize| -> usize {
                members.iter().map(|m| lines(&self.units[*m])).sum()
            };
            let n_own = sum(|unit| unit.n_own_lines);
            if (n_own > 0) != has_character {
                continue;
            }
            let stratum = strata.entry(&self.units[members[0]].stratum).or_default();
            stratum.push(Group {
                members,
                n_lines: if n_own > 0 {
                    n_own
                } else {
                    sum(|unit| unit.n_lines).max(1)
                },
                order: order(self.options.seed, purpose, self.first_id(members)),
            });
        }
        let all = || strata.values().flatten();
        let n_lines = all().map(|g| g.n_lines).sum::<usize>() as f64;
        // A group that would be most of the held-out part stays in training.
        let most = (share * n_lines / 2.0).max(2.0 * n_lines / all().count().max(1) as f64);
        let mut drawn = Vec::new();
        let mut owed = 0.0;
        for groups in strata.values_mut() {
            groups.sort_by_key(|group| group.order);
            owed += share * groups.iter().map(|group| group.n_lines as f64).sum::<f64>();
            for group in groups.iter() {
                if owed <= 0.0 {
                    break;
                }
                if group.n_lines as f64 <= most {
                    owed -= group.n_lines as f64;
                    drawn.push(group.members);
                }
            }
        }
        drawn
    }

    fn first_id(&self, members: &[usize]) -> &str {
        let ids = members.iter().map(|m| self.units[*m].id.as_str());
        ids.min().unwrap_or_default()
    }

    fn note(&mut self, note: String) {
        self.report.notes.push(note);
    }
}

struct Mission<'u> {
    name: &'u str,
    members: Vec<usize>,
    has_character: bool,
    /// Lines that count, as of a group.
    n_lines: usize,
    order: [u8; 32],
}

impl<'u> Mission<'u> {
    fn new(name: &'u str, members: Vec<usize>, units: &[Unit], seed: u64) -> Mission<'u> {
        let n_own: usize = members.iter().map(|m| units[*m].n_own_lines).sum();
        let n_all: usize = members.iter().map(|m| units[*m].n_lines).sum();
        Mission {
            name,
            members,
            has_character: n_own > 0,
            n_lines: if n_own > 0 { n_own } else { n_all.max(1) },
            order: order(seed, "val-strict", name),
        }
    }
}

/// The seeded place of a thing in the order of a draw.
fn order(seed: u64, purpose: &str, id: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(seed.to_le_bytes());
    if !purpose.is_empty() {
        hash.update(purpose);
        hash.update([0]);
    }
    hash.update(id);
    hash.finalize().into()
}
