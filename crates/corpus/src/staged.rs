//! Data sets whose files are complete but not yet named, and how all of them get their names at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Instant;

use text::WrittenTokens;

use crate::dataset::DatasetPart;
use crate::error::Result;
use crate::manifest::{self, Dataset, Manifest, RowScenes, SourceFiles, TrainingTokens, Warning};
use crate::output::{self, Pending};
use crate::request::BuildRequest;
use crate::stopwatch::Times;
use crate::task::Task;

/// What was built.
#[derive(Debug, Clone)]
pub struct BuildReport {
    /// What the manifest says of each data set.
    pub datasets: BTreeMap<Task, Dataset>,
    /// Where the time went.
    pub times: Times,
}

impl BuildReport {
    /// Tokens over all data sets, records and languages.
    pub fn n_tokens(&self) -> u64 {
        self.datasets.values().map(Dataset::n_tokens).sum()
    }

    /// What training reads of the conversations of all data sets; `None` where there are none.
    pub fn training(&self) -> Option<TrainingTokens> {
        TrainingTokens::sum(self.datasets.values().map(Dataset::training))
    }
}

/// A build that only lacks its names; dropped, it leaves nothing behind.
pub struct Staged<'a> {
    pub(crate) request: BuildRequest<'a>,
    pub(crate) manifest: Manifest,
    pub(crate) built: Vec<Built>,
    pub(crate) times: Times,
}

/// A data set whose files are complete but not yet named.
pub(crate) struct Built {
    pub task: Task,
    pub source_sha256: String,
    pub source_files: SourceFiles,
    pub parts: Vec<DatasetPart>,
    pub warnings: Warnings,
}

/// What looks wrong, each once with its count, in the order in which it was met.
#[derive(Default)]
pub(crate) struct Warnings {
    list: Vec<Warning>,
    places: HashMap<String, usize>,
}

impl Warnings {
    pub fn add(&mut self, text: String, count: usize) {
        let place = *self.places.entry(text).or_insert_with_key(|text| {
            self.list.push(Warning {
                text: text.clone(),
                count: 0,
            });
            self.list.len() - 1
        });
        self.list[place].count += count as u64;
    }

    pub fn add_markup(&mut self, unknown: BTreeMap<String, usize>) {
        for (tag, n) in unknown {
            self.add(format!("unknown markup {tag}"), n);
        }
    }

    fn add_written(&mut self, written: &WrittenTokens) {
        for (token, n) in written.iter() {
            let text = format!(
                "{token}, a control token, stands in a text of the source; there it is text and no token (docs/conversation.md)"
            );
            self.add(text, n as usize);
        }
    }
}

impl Staged<'_> {
    /// Writes the token counts, then gives all files their names; the manifest comes last.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn publish(self) -> Result<BuildReport> {
        let start = Instant::now();
        let mut times = self.times;
        let mut pending: Vec<Pending> = Vec::new();
        let mut datasets = BTreeMap::new();
        let mut manifest = self.manifest;
        let mut unlisted = manifest.clone();
        for Built {
            task,
            source_sha256,
            source_files,
            parts,
            mut warnings,
        } in self.built
        {
            for part in &parts {
                warnings.add_written(&part.written);
            }
            let tokens_file = format!("{task}.json");
            let mut counts = Pending::create(self.request.out.join(&tokens_file))?;
            counts.write(&output::tokens_json(
                parts.iter().map(|p| (p.file.key.as_str(), &p.tokens[..])),
            ))?;
            let tokens_sha256 = counts.finish()?.sha256;
            pending.push(counts);
            let mut dataset = Dataset {
                source: self.request.source.name().to_owned(),
                source_sha256,
                source_files,
                character: self.request.character.origin.id.clone(),
                character_sha256: self.request.character.origin.sha256.clone(),
                tokens_file,
                tokens_sha256,
                scenes: Vec::new(),
                files: Vec::new(),
                warnings: warnings.list,
            };
            let mut scene_idx = BTreeMap::new();
            for mut part in parts {
                let places: Vec<u32> = part
                    .scenes
                    .into_iter()
                    .map(|scene| {
                        *scene_idx.entry(scene).or_insert_with_key(|scene| {
                            dataset.scenes.push(scene.clone());
                            dataset.scenes.len() as u32 - 1
                        })
                    })
                    .collect();
                for row in &mut part.file.rows {
                    match row {
                        RowScenes::One(idx) => *idx = places[*idx as usize],
                        RowScenes::Several(parts) => {
                            for (idx, ..) in parts {
                                *idx = places[*idx as usize];
                            }
                        }
                    }
                }
                dataset.files.push(part.file);
                pending.push(part.pending);
            }
            manifest.datasets.insert(task.to_string(), dataset.clone());
            datasets.insert(task, dataset);
        }
        // Every file is on the disk before the first gets its name.
        for file in &mut pending {
            times.write += file.settle()?;
        }
        // A build that dies between two renames must not leave old and new files listed as one data set.
        let path = self.request.out.join(manifest::FILE_NAME);
        let n_listed = unlisted.datasets.len();
        unlisted
            .datasets
            .retain(|name, _| datasets.keys().all(|task: &Task| task.name() != name));
        if unlisted.datasets.len() < n_listed {
            files::write(&path, &unlisted.to_json())?;
        }
        let mut folders = BTreeSet::new();
        for file in pending {
            folders.extend(file.publish()?);
        }
        for folder in &folders {
            files::sync_folder(folder)?;
        }
        files::write(&path, &manifest.to_json())?;
        times.publish = start.elapsed();
        Ok(BuildReport { datasets, times })
    }
}
