//! Data sets as Parquet files for Polars, Spark, Ray and DuckDB: the rows of the JSON lines, one for one, with what the
//! manifest and the split know of each.

mod parquet;
mod thrift;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use self::parquet::{Column, Leaf, Node, Times};
use crate::error::{Error, Result};
use crate::manifest::DataFile;
use crate::output::Pending;
use crate::rows::{self, Found, Record};
use crate::split::{Side, Split};

/// Side of a row whose scenes are on several.
const SEVERAL_SIDES: &str = "several";
/// Bytes of contents after which a row group is written.
const GROUP_BYTES: usize = 32 << 20;

/// A file that was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Exported {
    /// Where it lies.
    pub path: PathBuf,
    /// Rows in it.
    pub n_rows: u64,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its bytes, in hexadecimal digits.
    pub sha256: String,
}

/// Writes every file of a data set (its folder, or one file of it) as Parquet: beside the JSON lines, or below `out` in
/// the same folders. Files get their names when all of them are complete.
///
/// # Errors
/// As [`rows::load`]; a file that cannot be written.
pub fn parquet(path: &Path, split: Option<&Split>, out: Option<&Path>) -> Result<Vec<Exported>> {
    let found = rows::find(path, split)?;
    let counts = found.token_counts()?;
    let files = found
        .files
        .par_iter()
        .map(|file| {
            let target = out.unwrap_or(&found.out).join(&file.path);
            let target = target.with_extension("parquet");
            let mut pending = Pending::create(target.clone())?;
            let tokens = found.tokens_of(file, &counts)?;
            write_file(&mut pending, &found, file, tokens, split)?;
            let written = pending.finish()?;
            let exported = Exported {
                path: target,
                n_rows: file.n_rows,
                bytes: written.bytes,
                sha256: written.sha256,
            };
            Ok((pending, exported))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut exported = Vec::new();
    let mut folders = BTreeSet::new();
    for (pending, file) in files {
        folders.extend(pending.publish()?);
        exported.push(file);
    }
    for folder in &folders {
        files::sync_folder(folder)?;
    }
    Ok(exported)
}

fn write_file(
    pending: &mut Pending,
    found: &Found,
    file: &DataFile,
    tokens: &[u64],
    split: Option<&Split>,
) -> Result<()> {
    let mut parquet = parquet::File::new(schema());
    pending.write(parquet.begin())?;
    let mut group = Group::default();
    found.each_record(
        file,
        |_| true,
        |record| {
            let tokens = tokens[record.idx];
            group.push(found, file, split, record, tokens)?;
            if group.n_bytes >= GROUP_BYTES {
                let full = std::mem::take(&mut group);
                full.write(&mut parquet, pending, found, file)?;
            }
            Ok(())
        },
    )?;
    group.write(&mut parquet, pending, found, file)?;
    pending.write(&parquet.end(&[
        ("cyrene.dataset", &found.task),
        ("cyrene.file", &file.path),
        ("cyrene.file_sha256", &file.sha256),
        ("cyrene.source_sha256", &found.dataset.source_sha256),
    ]))
}

/// The columns; docs/corpus-output.md says what they hold.
fn schema() -> Vec<Node> {
    use Leaf::{Int32, Int64, Text};
    use Times::{Once, OnceOrNot};
    vec![
        Node::list(
            "messages",
            vec![
                Node::leaf("role", Once, Text),
                Node::leaf("content", Once, Text),
            ],
        ),
        Node::leaf("language", OnceOrNot, Text),
        Node::leaf("scene", OnceOrNot, Text),
        Node::list(
            "scenes",
            vec![
                Node::leaf("scene", Once, Text),
                Node::leaf("lines", OnceOrNot, Int32),
                Node::leaf("tokens", OnceOrNot, Int32),
                Node::leaf("side", OnceOrNot, Text),
            ],
        ),
        Node::leaf("tokens", Once, Int64),
        Node::leaf("side", OnceOrNot, Text),
    ]
}

/// The columns of a row group, in the order of [`schema`].
#[derive(Default)]
struct Group {
    n_rows: usize,
    n_bytes: usize,
    roles: Column,
    contents: Column,
    languages: Column,
    first_scenes: Column,
    scenes: Column,
    scene_lines: Column,
    scene_tokens: Column,
    scene_sides: Column,
    tokens: Column,
    sides: Column,
}

impl Group {
    fn push(
        &mut self,
        found: &Found,
        file: &DataFile,
        split: Option<&Split>,
        record: Record<'_>,
        tokens: u64,
    ) -> Result<()> {
        // 1. who says what
        for (idx, message) in record.messages.iter().enumerate() {
            let repeats = i16::from(idx > 0);
            self.n_bytes += message.content.len();
            self.roles.text(message.role.name(), 1, repeats);
            self.contents.text(&message.content, 1, repeats);
        }
        if record.messages.is_empty() {
            self.roles.absent(0, 0);
            self.contents.absent(0, 0);
        }
        optional(&mut self.languages, file.language.map(|l| l.code()));
        // 2. where from
        let scenes = found.scenes_of(file, record.origin)?;
        optional(
            &mut self.first_scenes,
            scenes.first().map(|part| part.scene),
        );
        for (idx, part) in scenes.iter().enumerate() {
            let repeats = i16::from(idx > 0);
            self.scenes.text(part.scene, 1, repeats);
            match part.lines_and_tokens {
                Some((n_lines, tokens)) => {
                    self.scene_lines.i32(n_lines as i32, 2, repeats);
                    self.scene_tokens.i32(tokens as i32, 2, repeats);
                }
                None => {
                    self.scene_lines.absent(1, repeats);
                    self.scene_tokens.absent(1, repeats);
                }
            }
            match split {
                Some(_) => {
                    let side = found.side(file, split, part.scene)?;
                    self.scene_sides.text(side.name(), 2, repeats);
                }
                None => self.scene_sides.absent(1, repeats),
            }
        }
        if scenes.is_empty() {
            for column in [
                &mut self.scenes,
                &mut self.scene_lines,
                &mut self.scene_tokens,
                &mut self.scene_sides,
            ] {
                column.absent(0, 0);
            }
        }
        // 3. how long, on which side
        self.tokens.i64(tokens as i64, 0, 0);
        let side = match split {
            Some(_) => Some(
                found
                    .row_side(file, split, record.origin)?
                    .map_or(SEVERAL_SIDES, Side::name),
            ),
            None => None,
        };
        optional(&mut self.sides, side);
        self.n_rows += 1;
        Ok(())
    }

    /// Writes what has come together, if anything has.
    fn write(
        self,
        parquet: &mut parquet::File,
        pending: &mut Pending,
        found: &Found,
        file: &DataFile,
    ) -> Result<()> {
        if self.n_rows == 0 {
            return Ok(());
        }
        let columns = [
            &self.roles,
            &self.contents,
            &self.languages,
            &self.first_scenes,
            &self.scenes,
            &self.scene_lines,
            &self.scene_tokens,
            &self.scene_sides,
            &self.tokens,
            &self.sides,
        ];
        let bytes = parquet
            .row_group(self.n_rows, &columns)
            .map_err(|parquet::PageTooLong| Error::RowTooLong {
                path: found.out.join(&file.path),
            })?;
        pending.write(&bytes)
    }
}

fn optional(column: &mut Column, value: Option<&str>) {
    match value {
        Some(value) => column.text(value, 1, 0),
        None => column.absent(0, 0),
    }
}
