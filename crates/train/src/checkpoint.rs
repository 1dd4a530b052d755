//! Checkpoints: everything a run needs to go on as if it had never stopped, in folders that are whole or not there at all.
//!
//! ```text
//! checkpoints/step-N/model/                 Hugging Face folder with the weights as they are trained (f32 master weights stay f32)
//! checkpoints/step-N/adapter/               instead of model/ when an adapter is trained (PEFT)
//! checkpoints/step-N/optimizer.safetensors  `m.<name>`, `v.<name>`: AdamW's moments, f32, or on a GPU the weights' type
//! checkpoints/step-N/state.json             [`State`]
//! checkpoints/step-N/SHA256SUMS             of all of these, written last
//! checkpoints/damaged-step-N/               one whose files were not as written when the run went on from an older one
//! checkpoints/last, checkpoints/best        text files that hold a folder's name: links would need rights that Windows does not give everyone
//! ```
//! The order of the data needs no cursor but the step: it follows from the seed.

use std::borrow::Cow;
use std::cell::Cell;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use files::{NewFolder, SUMS, Wholeness, outside};
use kernel::cuda::Pinned;
use kernel::{DType, Tensor};
use model::Model;
use safetensors::tensor::Metadata;
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, IoContext, Result};
use crate::job::RunConfig;
use crate::metrics::{TrainLine, ValidationLine};
use crate::optimizer::{AdamW, Moments};
use crate::ranks::{Ranks, copy_sent, host_bytes, set_host_bytes};
use crate::tensorboard::Position;

/// Form of `state.json`; from 2 on a list of sums lies beside it.
const VERSION: u32 = 2;
const FIRST_WITH_SUMS: u32 = 2;
/// Steps of the longest run; see `run.steps`.
const MOST_STEPS: u64 = 10_000_000;

/// What a checkpoint remembers besides weights and moments.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Version of this file.
    pub version: u32,
    /// Optimizer steps done; also the position in the data.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// What decides the numbers of a run, key by key; see `identity.rs`.
    pub identity: serde_json::Map<String, Value>,
    /// As the job gave it.
    pub origin: Value,
    /// Lowest held-out loss so far.
    pub best: Option<Best>,
    /// Seconds of training so far, over all starts.
    pub elapsed_s: f64,
    /// Length of metrics.jsonl when this was written.
    pub metrics_bytes: u64,
    /// Where the event file ended.
    pub tensorboard: Position,
    /// The step whose held-out loss is the newest.
    pub validated_step: Option<u64>,
    /// The last training step.
    pub last_train: Option<TrainLine>,
    /// The last held-out losses.
    pub last_validation: Vec<ValidationLine>,
}

/// The lowest held-out loss and the step that had it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// The step, from 1.
    pub step: u64,
    /// Its held-out loss.
    pub loss: f64,
}

impl State {
    /// Whether a list of sums lies beside it, and its identity knows the base's bytes and the type of the numbers.
    pub fn has_sums(&self) -> bool {
        self.version >= FIRST_WITH_SUMS
    }

    /// Refuses what no run can have written: a checkpoint may come from somebody else.
    ///
    /// # Errors
    /// [`Error::StateValue`] with the key and its range.
    fn check(&self, folder: &Path) -> Result<()> {
        let refused = |key, value: String, expected: String| Error::StateValue {
            path: folder.join("state.json"),
            key,
            value,
            expected,
        };
        // Some three thousand years.
        if !(0.0..=1e11).contains(&self.elapsed_s) {
            let expected = "from 0 to 1e11".to_owned();
            return Err(refused("elapsed_s", self.elapsed_s.to_string(), expected));
        }
        let steps = [
            ("total_steps", Some(self.total_steps), MOST_STEPS),
            ("step", Some(self.step), MOST_STEPS),
            ("validated_step", self.validated_step, self.step),
            ("best.step", self.best.map(|best| best.step), self.step),
        ];
        for (key, step, most) in steps {
            if let Some(step) = step.filter(|step| *step > most) {
                return Err(refused(key, step.to_string(), format!("from 0 to {most}")));
            }
        }
        Ok(())
    }

    /// The state before the first step.
    pub fn start(
        total_steps: u64,
        identity: serde_json::Map<String, Value>,
        origin: Value,
        tensorboard: Position,
    ) -> Self {
        State {
            version: VERSION,
            step: 0,
            total_steps,
            identity,
            origin,
            best: None,
            elapsed_s: 0.0,
            metrics_bytes: 0,
            tensorboard,
            validated_step: None,
            last_train: None,
            last_validation: Vec::new(),
        }
    }
}

/// The checkpoints of one run.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    /// The newest whole one.
    newest: Option<u64>,
    set_aside: Vec<SetAside>,
}

/// A checkpoint that was damaged when the run was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetAside {
    /// Where it lies now.
    pub folder: PathBuf,
    /// Its step.
    pub step: u64,
    /// Which file is damaged, and how.
    pub problem: String,
}

impl Checkpoints {
    /// Opens `out_dir/checkpoints`, makes it if absent, clears away what an interrupted write left, and holds the newest checkpoint
    /// against its sums: a damaged one is set aside, and the one before it taken.
    ///
    /// # Errors
    /// The folder cannot be made, read or cleared; every checkpoint is damaged ([`Error::NoWholeCheckpoint`]), none of which is touched then.
    pub fn open(out_dir: &Path) -> Result<Self> {
        let dir = out_dir.join("checkpoints");
        fs::create_dir_all(&dir).during("making", &dir)?;
        files::clear_leftovers(&dir, |name| {
            name.starts_with("step-") || ["last", "best"].contains(&name)
        })?;
        let (newest, damaged) = newest_whole(&dir)?;
        let mut checkpoints = Checkpoints {
            dir,
            newest,
            set_aside: Vec::new(),
        };
        for (step, problem) in damaged {
            checkpoints.put_aside(step, problem)?;
        }
        if let (Some(newest), false) = (newest, checkpoints.set_aside.is_empty()) {
            checkpoints.point_to_what_is_there(newest)?;
        }
        Ok(checkpoints)
    }

    /// `last` names the newest again, and `best` nothing that was set aside.
    fn point_to_what_is_there(&self, newest: u64) -> Result<()> {
        self.point("last", newest)?;
        let best = self.dir.join("best");
        let named = fs::read_to_string(&best).unwrap_or_default();
        let is_gone = |damaged: &SetAside| named.trim() == format!("step-{}", damaged.step);
        if self.set_aside.iter().any(is_gone) {
            fs::remove_file(&best).during("removing", &best)?;
        }
        Ok(())
    }

    /// What was set aside when the run was opened, newest first.
    pub fn set_aside(&self) -> &[SetAside] {
        &self.set_aside
    }

    /// Gives a damaged checkpoint a name that nobody goes on from.
    fn put_aside(&mut self, step: u64, problem: String) -> Result<()> {
        let from = self.folder(step);
        let mut names = (1..).map(|n| match n {
            1 => format!("damaged-step-{step}"),
            n => format!("damaged-step-{step}-{n}"),
        });
        let free = names.find(|name| !self.dir.join(name).exists());
        let folder = self.dir.join(free.unwrap_or_default());
        files::move_folder(&from, &folder)?;
        self.set_aside.push(SetAside {
            folder,
            step,
            problem,
        });
        Ok(())
    }

    /// The weights of a checkpoint into `model`, if its files are as they were written.
    ///
    /// # Errors
    /// [`Error::DamagedCheckpoint`]; as [`read_weights`].
    pub fn read_checked(&self, step: u64, model: &mut Model) -> Result<()> {
        let folder = self.folder(step);
        if let Some(problem) = damage_of(&folder)? {
            return Err(Error::DamagedCheckpoint { folder, problem });
        }
        read_weights(&folder, model)
    }

    /// Those that rank 0 writes, as another rank knows them: nothing on its own disk is looked at or touched.
    pub fn of_first_rank(out_dir: &Path) -> Self {
        Checkpoints {
            dir: out_dir.join("checkpoints"),
            newest: None,
            set_aside: Vec::new(),
        }
    }

    /// The same, with the newest as rank 0 said it.
    pub fn with_newest(self, newest: Option<u64>) -> Self {
        Checkpoints { newest, ..self }
    }

    /// Step and folder of the newest checkpoint.
    pub fn newest(&self) -> Option<(u64, PathBuf)> {
        self.newest.map(|step| (step, self.folder(step)))
    }

    /// Writes the checkpoint of `state.step` (if it is not there already), names it in `last`, and in `best` if it has the lowest
    /// held-out loss, and removes all but the `keep_last` newest (0 keeps all) and the best. Rank 0 does that; the others hand it the
    /// moments that they own.
    ///
    /// # Errors
    /// The disk is full or refuses, or a rank is gone; no checkpoint is damaged then.
    pub fn write(
        &mut self,
        model: &Model,
        optimizer: &AdamW,
        state: &State,
        base_name: &str,
        run: &RunConfig,
        ranks: &Ranks,
    ) -> Result<PathBuf> {
        let folder = self.folder(state.step);
        if !ranks.is_first() {
            hand_out_moments(optimizer, ranks)?;
            self.newest = Some(state.step);
            return Ok(folder);
        }
        if self.newest != Some(state.step) {
            let new = NewFolder::create(&folder)?;
            write_folder(new.path(), model, optimizer, state, base_name, ranks)?;
            new.replace()?;
            self.newest = Some(state.step);
        }
        for peer in 1..ranks.n_ranks() {
            ranks.send(peer, &[])?;
        }
        self.point("last", state.step)?;
        let best = state.best.map(|best| best.step);
        if run.save_best && best == Some(state.step) {
            self.point("best", state.step)?;
        }
        self.prune(run.keep_last, best)?;
        Ok(folder)
    }

    /// Where the checkpoint of a step lies, or would lie.
    pub fn folder(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    fn point(&self, name: &str, step: u64) -> Result<()> {
        files::write(&self.dir.join(name), format!("step-{step}\n").as_bytes())?;
        Ok(())
    }

    fn prune(&self, keep_last: usize, best: Option<u64>) -> Result<()> {
        if keep_last == 0 {
            return Ok(());
        }
        let steps = steps_in(&self.dir)?;
        let old = &steps[..steps.len().saturating_sub(keep_last)];
        for step in old.iter().filter(|step| best != Some(**step)) {
            files::remove_folder(&self.folder(*step))?;
        }
        Ok(())
    }
}

/// Reads `state.json` of a checkpoint.
///
/// # Errors
/// The file is missing or not what this version writes.
pub fn read_state(folder: &Path) -> Result<State> {
    let path = folder.join("state.json");
    let json = outside::read(&path, outside::MOST_SETTINGS_BYTES).during("reading", &path)?;
    let state: State =
        serde_json::from_slice(&json).map_err(|source| Error::State { path, source })?;
    if state.version > VERSION {
        return Err(Error::NewerCheckpoint {
            folder: folder.to_owned(),
            version: state.version,
        });
    }
    state.check(folder)?;
    Ok(state)
}

/// The newest checkpoint of the run in `out_dir` whose weights are numbers; none where nothing of the kind lies there.
pub fn last_finite(out_dir: &Path) -> Option<PathBuf> {
    let dir = out_dir.join("checkpoints");
    let is_finite = |folder: &PathBuf| {
        let weights = ["model", "adapter"].map(|name| folder.join(name));
        let weights = weights.iter().find(|weights| weights.is_dir());
        weights.is_some_and(|weights| model::checkpoint::check_finite(weights).is_ok())
    };
    let newest_first = steps_in(&dir).ok()?.into_iter().rev();
    let mut folders = newest_first.map(|step| dir.join(format!("step-{step}")));
    folders.find(is_finite)
}

/// Reads the trained weights into `model`, which is the base (with an adapter attached, if one was trained).
///
/// # Errors
/// The folder is damaged, or of another model.
pub fn read_weights(folder: &Path, model: &mut Model) -> Result<()> {
    if model.lora().is_some() {
        return Ok(model.load_adapter(&folder.join("adapter"))?);
    }
    let path = folder.join("model");
    let trained = Model::load(&path, model.dtype())?;
    if trained.trainable_names() != model.trainable_names() {
        return Err(Error::OtherModel { path });
    }
    // Into the model that was handed in: it knows in which types the result is to be saved.
    for (weight, trained) in model.trainable_mut().into_iter().zip(trained.trainable()) {
        if weight.shape() != trained.shape() {
            return Err(Error::OtherModel { path });
        }
        weight.copy_from(trained)?;
    }
    Ok(())
}

/// Reads AdamW's moments into `optimizer`, whose tensors have `names` in order, and sends those that other ranks own to them.
///
/// # Errors
/// The file is missing, damaged, or of another model; a rank is gone.
pub fn read_optimizer(
    folder: &Path,
    names: &[String],
    optimizer: &mut AdamW,
    ranks: &Ranks,
) -> Result<()> {
    let path = folder.join("optimizer.safetensors");
    let mut file = outside::open(&path).during("opening", &path)?;
    let (data_start, metadata) = read_header(&mut file, &path)?;
    let AdamW {
        owners, moments, ..
    } = optimizer;
    for kind in Kind::ALL {
        for ((name, moments), owner) in names.iter().zip(&mut *moments).zip(owners.ranks()) {
            let name = kind.name(name);
            let moment = Moment::of(moments, kind);
            let info = metadata
                .info(&name)
                .filter(|info| info.dtype == file_dtype(moment.dtype) && info.shape == moment.shape)
                .ok_or_else(|| Error::OptimizerTensor {
                    path: path.clone(),
                    name,
                    shape: moment.shape.to_vec(),
                    dtype: moment.dtype,
                })?;
            file.seek(SeekFrom::Start(data_start + info.data_offsets.0 as u64))
                .during("seeking in", &path)?;
            let mut bytes = vec![0; moment.n_bytes()];
            file.read_exact(&mut bytes).during("reading", &path)?;
            match *owner == ranks.rank() {
                true => set_moment(moments, kind, &bytes)?,
                false => ranks.send(*owner, &bytes)?,
            }
        }
    }
    Ok(())
}

/// The other side of [`read_optimizer`]: takes the moments that this rank owns from rank 0.
///
/// # Errors
/// A rank is gone.
pub fn receive_optimizer(optimizer: &mut AdamW, ranks: &Ranks) -> Result<()> {
    for kind in Kind::ALL {
        for moments in &mut optimizer.moments {
            if !matches!(moments, Moments::Elsewhere { .. }) {
                set_moment(moments, kind, &ranks.receive(0)?)?;
            }
        }
    }
    Ok(())
}

/// Tells the other ranks where rank 0 found the run, and whether moments follow.
///
/// # Errors
/// A rank is gone.
pub fn share_state(state: &State, has_moments: bool, ranks: &Ranks) -> Result<()> {
    if ranks.n_ranks() > 1 {
        let said = serde_json::to_vec(&(state, has_moments)).map_err(|source| Error::State {
            path: PathBuf::from("the state that rank 0 shares"),
            source,
        })?;
        ranks.from_first(said)?;
    }
    Ok(())
}

/// The other side of [`share_state`]; `out_dir` is named in an error.
///
/// # Errors
/// A rank is gone.
pub fn shared_state(out_dir: &Path, ranks: &Ranks) -> Result<(State, bool)> {
    let said = ranks.from_first(Vec::new())?;
    serde_json::from_slice(&said).map_err(|source| Error::State {
        path: out_dir.join("checkpoints"),
        source,
    })
}

/// Gives rank 0 each moment that it asks for, until it has no more questions.
fn hand_out_moments(optimizer: &AdamW, ranks: &Ranks) -> Result<()> {
    loop {
        let asked = ranks.receive(0)?;
        let Ok([kind, tensor_idx @ ..]) = <[u8; 9]>::try_from(asked) else {
            return Ok(());
        };
        let kind = Kind::ALL[usize::from(kind != 0)];
        let moments = &optimizer.moments[u64::from_le_bytes(tensor_idx) as usize];
        ranks.send(0, &Moment::of(moments, kind).bytes()?)?;
    }
}

/// Start of the data and the table of tensors. Read by hand, so that one moment at a time is in memory.
fn read_header(file: &mut File, path: &Path) -> Result<(u64, Metadata)> {
    let mut length = [0; 8];
    file.read_exact(&mut length).during("reading", path)?;
    let length = u64::from_le_bytes(length);
    let file_length = file.metadata().during("reading", path)?.len();
    let truncated = || Error::OptimizerFile {
        path: path.to_path_buf(),
        source: safetensors::SafeTensorError::MetadataIncompleteBuffer,
    };
    let data_start = length
        .checked_add(8)
        .filter(|start| *start <= file_length)
        .ok_or_else(truncated)?;
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).during("reading", path)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|source| Error::OptimizerFile {
            path: path.to_path_buf(),
            source: source.into(),
        })?;
    if data_start + metadata.data_len() as u64 != file_length {
        return Err(truncated());
    }
    Ok((data_start, metadata))
}

fn write_folder(
    folder: &Path,
    model: &Model,
    optimizer: &AdamW,
    state: &State,
    base_name: &str,
    ranks: &Ranks,
) -> Result<()> {
    save_weights(model, folder, Some(model.dtype()), base_name)?;

    let path = folder.join("optimizer.safetensors");
    let names = model.trainable_names();
    let failed = Cell::new(None);
    let tensors = Kind::ALL.into_iter().flat_map(|kind| {
        let failed = &failed;
        let named = names.iter().zip(&optimizer.moments).enumerate();
        named.map(move |(tensor_idx, (name, moments))| {
            let written = Written {
                moment: Moment::of(moments, kind),
                kind,
                tensor_idx,
                owner: optimizer.owners.ranks()[tensor_idx],
                ranks,
                failed,
            };
            (kind.name(name), written)
        })
    });
    safetensors::serialize_to_file(tensors, None, &path).map_err(|source| match source {
        safetensors::SafeTensorError::IoError(source) => Error::Io {
            action: "writing",
            path,
            source,
        },
        source => Error::OptimizerFile { path, source },
    })?;
    if let Some(error) = failed.take() {
        return Err(error);
    }

    let path = folder.join("state.json");
    let json = serde_json::to_vec_pretty(state)
        .map_err(std::io::Error::from)
        .during("writing", &path)?;
    fs::write(&path, json).during("writing", &path)?;
    files::write_sums(folder)?;
    Ok(())
}

/// Saves the trained weights below `parent`: `adapter/` where one is attached, else `model/`. Returns the folder.
///
/// # Errors
/// The folder cannot be written.
pub fn save_weights(
    model: &Model,
    parent: &Path,
    dtype: Option<kernel::DType>,
    base_name: &str,
) -> Result<PathBuf> {
    let folder = weights_folder(model, parent);
    match model.lora() {
        Some(_) => model.save_adapter(&folder, base_name)?,
        None => model.save(&folder, dtype)?,
    }
    Ok(folder)
}

/// Where trained weights lie below `parent`: `adapter/` where one is attached, else `model/`.
pub fn weights_folder(model: &Model, parent: &Path) -> PathBuf {
    parent.join(match model.lora() {
        Some(_) => "adapter",
        None => "model",
    })
}

/// Which of the two moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    M,
    V,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::M, Kind::V];

    /// A moment's name in the file.
    fn name(self, tensor: &str) -> String {
        match self {
            Kind::M => format!("m.{tensor}"),
            Kind::V => format!("v.{tensor}"),
        }
    }
}

/// One moment of one tensor, wherever it lies.
struct Moment<'a> {
    shape: &'a [usize],
    dtype: DType,
    place: Place<'a>,
}

enum Place<'a> {
    Tensor(&'a Tensor),
    Pinned(&'a Pinned),
    /// With the rank that owns the tensor.
    Elsewhere,
}

impl<'a> Moment<'a> {
    fn of(moments: &'a Moments, kind: Kind) -> Self {
        let (shape, dtype, place) = match (moments, kind) {
            (Moments::Resident { m: tensor, .. }, Kind::M)
            | (Moments::Resident { v: tensor, .. }, Kind::V) => {
                (tensor.shape(), tensor.dtype(), Place::Tensor(tensor))
            }
            (Moments::Host(host), Kind::M) => (host.shape(), host.dtype(), Place::Pinned(&host.m)),
            (Moments::Host(host), Kind::V) => (host.shape(), host.dtype(), Place::Pinned(&host.v)),
            (Moments::Elsewhere { shape, dtype }, _) => {
                (shape.as_slice(), *dtype, Place::Elsewhere)
            }
        };
        Moment {
            shape,
            dtype,
            place,
        }
    }

    /// The bytes, fetched from the device if they lie there; none of what lies elsewhere.
    fn bytes(&self) -> Result<Cow<'a, [u8]>> {
        match self.place {
            Place::Tensor(tensor) => host_bytes(tensor),
            Place::Pinned(pinned) => Ok(pinned.bytes()?.into()),
            Place::Elsewhere => Ok(Cow::default()),
        }
    }

    fn n_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Overwrites a moment that lies here.
fn set_moment(moments: &mut Moments, kind: Kind, bytes: &[u8]) -> Result<()> {
    match (moments, kind) {
        (Moments::Resident { m: tensor, .. }, Kind::M)
        | (Moments::Resident { v: tensor, .. }, Kind::V) => set_host_bytes(tensor, bytes),
        (Moments::Host(host), Kind::M) => copy_sent(host.m.bytes_mut()?, bytes),
        (Moments::Host(host), Kind::V) => copy_sent(host.v.bytes_mut()?, bytes),
        (Moments::Elsewhere { .. }, _) => unreachable!("moments go to the rank that owns them"),
    }
}

/// A moment as safetensors wants to see it: fetched from the device, or from the rank that owns it, only while it is written.
struct Written<'a> {
    moment: Moment<'a>,
    kind: Kind,
    tensor_idx: usize,
    owner: usize,
    ranks: &'a Ranks,
    /// Where a failed copy is reported: `data` cannot.
    failed: &'a Cell<Option<Error>>,
}

impl Written<'_> {
    fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        if self.owner == self.ranks.rank() {
            return self.moment.bytes();
        }
        let mut asked = [self.kind as u8; 9];
        asked[1..].copy_from_slice(&(self.tensor_idx as u64).to_le_bytes());
        self.ranks.send(self.owner, &asked)?;
        let bytes = self.ranks.receive(self.owner)?;
        match bytes.len() == self.data_len() {
            true => Ok(bytes.into()),
            false => Err(Error::Rank {
                rank: self.owner,
                what: format!(
                    "it has moments of {} bytes where {} are needed",
                    bytes.len(),
                    self.data_len()
                ),
            }),
        }
    }
}

impl View for Written<'_> {
    fn dtype(&self) -> Dtype {
        file_dtype(self.moment.dtype)
    }
    fn shape(&self) -> &[usize] {
        self.moment.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.bytes().unwrap_or_else(|error| {
            // The first failure is the cause of the others.
            let first = self.failed.take();
            self.failed.set(first.or(Some(error)));
            vec![0; self.data_len()].into()
        })
    }
    fn data_len(&self) -> usize {
        self.moment.n_bytes()
    }
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
    }
}

/// What is wrong with the checkpoint of a step.
type Damaged = (u64, String);

/// The newest checkpoint whose files are as they were written, and those after it, newest first.
fn newest_whole(dir: &Path) -> Result<(Option<u64>, Vec<Damaged>)> {
    let mut damaged: Vec<Damaged> = Vec::new();
    for step in steps_in(dir)?.into_iter().rev() {
        match damage_of(&dir.join(format!("step-{step}")))? {
            None => return Ok((Some(step), damaged)),
            Some(problem) => damaged.push((step, problem)),
        }
    }
    match damaged.first() {
        None => Ok((None, damaged)),
        Some((step, problem)) => Err(Error::NoWholeCheckpoint {
            dir: dir.to_owned(),
            step: *step,
            problem: problem.clone(),
        }),
    }
}

/// What is wrong with a checkpoint's files, if something is. Those of the first version have no sums, and their state alone is looked at.
fn damage_of(folder: &Path) -> Result<Option<String>> {
    let wholeness = match files::check_sums(folder) {
        Ok(wholeness) => wholeness,
        // A disk that gives a file's bytes no more.
        Err(error) => return Ok(Some(error.to_string())),
    };
    match wholeness {
        Wholeness::Whole => Ok(None),
        Wholeness::Damaged(damage) => Ok(Some(damage.to_string())),
        Wholeness::Unlisted => Ok(match read_state(folder) {
            Ok(state) if !state.has_sums() => None,
            Ok(_) => Some(format!("{SUMS} is missing")),
            Err(error @ Error::NewerCheckpoint { .. }) => return Err(error),
            Err(error) => Some(error.to_string()),
        }),
    }
}

/// Steps of the checkpoints in `dir`, whole or not, ascending.
fn steps_in(dir: &Path) -> Result<Vec<u64>> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(dir).during("listing", dir)? {
        let entry = entry.during("listing", dir)?;
        let name = entry.file_name();
        let step = name.to_string_lossy();
        let step = step
            .strip_prefix("step-")
            .and_then(|step| step.parse().ok());
        // A copy that somebody made, `step-0100`, is none of the run's.
        if let Some(step) = step
            && name == *format!("step-{step}")
            && entry.path().is_dir()
        {
            steps.push(step);
        }
    }
    steps.sort_unstable();
    Ok(steps)
}
