//! Folders of safetensors: read by memory map, written beside the old folder and swapped for it.
//!
//! A save that dies half-way leaves the previous folder as it was.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{ErrorKind, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use files::{FileName, NewFolder, outside};
use kernel::tensor::Storage;
use kernel::{DType, Device, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use crate::config::read_json;
use crate::{Error, Result};

#[cfg(target_endian = "big")]
compile_error!("safetensors are little-endian and are read and written by plain copies");

const INDEX: &str = "model.safetensors.index.json";
/// The only file of an adapter's weights.
pub(crate) const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// How to write a checkpoint.
#[derive(Debug, Clone)]
pub struct SaveOptions {
    /// Type of the text model's tensors; None: each as it was read.
    pub dtype: Option<DType>,
    /// Largest size of one file's tensors; a single larger tensor gets a file of its own.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        SaveOptions {
            dtype: None,
            max_shard_bytes: 5_000_000_000,
        }
    }
}

/// Files beside the weights that a folder needs to be usable, and that this engine hands on unread.
pub const COMPANION_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
];

/// Copies those of [`COMPANION_FILES`] that `from` holds.
///
/// # Errors
/// [`Error::Io`].
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in COMPANION_FILES {
        let source = from.join(name);
        if source.is_file() {
            files::copy(&source, &to.join(name))?;
        }
    }
    Ok(())
}

/// Refuses a folder of weights, of a model or an adapter, with numbers that are none.
///
/// # Errors
/// [`Error::NotFinite`] with the first tensor that holds NaN or infinities; the folder cannot be read.
pub fn check_finite(folder: &Path) -> Result<()> {
    let adapter = FileName::of_ours(ADAPTER_WEIGHTS);
    let source = match adapter.within(folder).exists() {
        true => Checkpoint::open_files(folder, &[adapter])?,
        false => Checkpoint::open(folder)?,
    };
    for name in source.names() {
        if !view_is_finite(source.require(name)?) {
            return Err(Error::NotFinite {
                name: name.to_owned(),
                place: source.path_of(name).display().to_string(),
            });
        }
    }
    Ok(())
}

/// A tensor of a mapped file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// The mapped files of one folder.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    dir: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

impl Checkpoint {
    /// Maps `model.safetensors`, or all files that the index names, which lie beside it.
    ///
    /// # Errors
    /// [`Error::NoModel`] with the first missing file, [`Error::Safetensors`], [`Error::MissingTensor`] for one that only the index knows.
    pub fn open(dir: &Path) -> Result<Self> {
        let index_path = dir.join(INDEX);
        if !index_path.exists() {
            let only = FileName::of_ours("model.safetensors");
            return Checkpoint::open_files(dir, &[only]);
        }
        let index = read_json(&index_path)?;
        let bad_index = |detail: String| Error::Index {
            path: index_path.clone(),
            detail,
        };
        let weight_map = index
            .get("weight_map")
            .and_then(Value::as_object)
            .ok_or_else(|| bad_index("there is no `weight_map`".to_owned()))?;
        let mut names = BTreeSet::new();
        for (tensor, file) in weight_map {
            let file = file.as_str().ok_or_else(|| {
                bad_index(format!(
                    "the file of `{tensor}` is {file}, which is no text"
                ))
            })?;
            names.insert(FileName::parse(file).map_err(|error| bad_index(error.to_string()))?);
        }
        let checkpoint = Checkpoint::open_files(dir, &Vec::from_iter(names))?;
        match weight_map
            .keys()
            .find(|name| checkpoint.get(name).is_none())
        {
            Some(name) => Err(checkpoint.missing(name)),
            None => Ok(checkpoint),
        }
    }

    /// Maps the named files of `dir`, each a regular file.
    pub fn open_files(dir: &Path, names: &[FileName]) -> Result<Self> {
        let mut checkpoint = Checkpoint {
            dir: dir.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
        };
        for name in names {
            let path = name.within(dir);
            let file = outside::open(&path).map_err(|source| match source.kind() {
                ErrorKind::NotFound => Error::NoModel {
                    dir: dir.to_owned(),
                    missing: name.to_string(),
                },
                _ => Error::io("open", &path)(source),
            })?;
            let map = map(&file).map_err(Error::io("map", &path))?;
            checkpoint.add(path, map)?;
        }
        Ok(checkpoint)
    }

    /// The folder that the files lie in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<View<'_>> {
        let entry = self.entries.get(name)?;
        let (_, map) = &self.files[entry.file_idx];
        Some(View {
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &map[entry.start..entry.end],
        })
    }

    /// As `get`, or the error that says which tensor is missing where.
    pub fn require(&self, name: &str) -> Result<View<'_>> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    /// The file a tensor lies in, for error texts.
    pub fn path_of(&self, name: &str) -> PathBuf {
        match self.entries.get(name) {
            Some(entry) => self.files[entry.file_idx].0.clone(),
            None => self.dir.clone(),
        }
    }

    fn add(&mut self, path: PathBuf, map: Mmap) -> Result<()> {
        // This checks that the tensors fill the file exactly: a truncated file ends here.
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| Error::Safetensors {
                path: path.clone(),
                detail: error.to_string(),
            })?;
        let data_start = 8 + header;
        for (name, info) in metadata.tensors() {
            let (start, end) = info.data_offsets;
            self.entries.insert(
                name,
                Entry {
                    file_idx: self.files.len(),
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    start: data_start + start,
                    end: data_start + end,
                },
            );
        }
        self.files.push((path, map));
        Ok(())
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor {
            name: name.to_owned(),
            dir: self.dir.clone(),
        }
    }
}

#[expect(
    unsafe_code,
    reason = "a memory map is the only way to read tens of gigabytes without holding them"
)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and private; the precondition is that nobody truncates or rewrites the file in place meanwhile,
    // which `Model::load` asks of its caller. Our own saves never do: they write new files and rename.
    unsafe { Mmap::map(file) }
}

/// Reads the elements of a plain float type as a tensor of `dtype`; None for any other type.
pub(crate) fn to_tensor(view: View, dtype: DType) -> Option<Tensor> {
    let tensor = match view.dtype {
        Dtype::BF16 => Tensor::from_bf16(view.shape, elements(view.bytes)),
        Dtype::F32 => Tensor::from_f32(view.shape, elements(view.bytes)),
        Dtype::F16 => {
            let halves: Vec<half::f16> = elements(view.bytes);
            Tensor::from_f32(view.shape, halves.into_iter().map(f32::from).collect())
        }
        _ => return None,
    };
    Some(match tensor.dtype() == dtype {
        true => tensor,
        false => tensor.to_dtype(dtype),
    })
}

/// Whether a tensor on the host holds neither NaN nor infinities.
pub(crate) fn is_finite(tensor: &Tensor) -> bool {
    match tensor.storage() {
        Storage::F32(data) => data.par_iter().all(|x| x.is_finite()),
        Storage::Bf16(data) => data.par_iter().all(|x| x.is_finite()),
        Storage::Cuda(..) => unreachable!("weights are checked before they go to a GPU"),
    }
}

/// As [`is_finite`], of a tensor of any type as a file holds it, read where it lies; whole numbers and types without NaN are finite.
pub(crate) fn view_is_finite(view: View) -> bool {
    // A number is not finite where all bits of its exponent are set, which lie in its last two bytes.
    let (size, exponent): (usize, u16) = match view.dtype {
        Dtype::BF16 => (2, 0x7F80),
        Dtype::F16 => (2, 0x7C00),
        Dtype::F32 | Dtype::C64 => (4, 0x7F80),
        Dtype::F64 => (8, 0x7FF0),
        Dtype::F8_E5M2 => return view.bytes.par_iter().all(|byte| byte & 0x7C != 0x7C),
        // No infinities: all bits but the sign's, all bits, and what would be -0.
        Dtype::F8_E4M3 => return view.bytes.par_iter().all(|byte| byte & 0x7F != 0x7F),
        Dtype::F8_E8M0 => return view.bytes.par_iter().all(|byte| *byte != 0xFF),
        Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ => {
            return view.bytes.par_iter().all(|byte| *byte != 0x80);
        }
        _ => return true,
    };
    let is_finite =
        |x: &[u8]| u16::from_le_bytes([x[size - 2], x[size - 1]]) & exponent != exponent;
    let pieces = view.bytes.par_chunks(size << 16);
    pieces.all(|piece| piece.chunks_exact(size).all(is_finite))
}

/// Copies bytes, aligned or not, to elements.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Vec<T> {
    let mut elements = vec![T::zeroed(); bytes.len() / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut elements).copy_from_slice(bytes);
    elements
}

/// The elements as a file holds them, wherever they are.
pub(crate) fn to_bytes(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    if tensor.device() != Device::Cpu {
        return to_bytes(&tensor.to_device(Device::Cpu)?, dtype);
    }
    if tensor.dtype() != dtype {
        return to_bytes(&tensor.to_dtype(dtype), dtype);
    }
    Ok(match tensor.storage() {
        Storage::F32(data) => bytemuck::cast_slice(data).to_vec(),
        Storage::Bf16(data) => bytemuck::cast_slice(data).to_vec(),
        Storage::Cuda(..) => unreachable!("copied to the host above"),
    })
}

pub(crate) fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
    }
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Planned {
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// Writes a folder: headers first, then tensors in any order, so that no more than one tensor needs to be in memory.
#[derive(Debug)]
pub(crate) struct Writer {
    folder: NewFolder,
    shards: Vec<File>,
    /// Name to (shard, offset in the file, bytes); taken out as they are written.
    places: HashMap<String, (usize, u64, u64)>,
}

impl Writer {
    /// Lays `planned` out in files `<stem>.safetensors` or `<stem>-0000i-of-0000n.safetensors` of at most `max_shard_bytes`, in a staging
    /// folder beside `dir`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(
        dir: &Path,
        stem: &str,
        planned: Vec<Planned>,
        max_shard_bytes: u64,
    ) -> Result<Self> {
        let mut writer = Writer {
            folder: NewFolder::create(dir)?,
            shards: Vec::new(),
            places: HashMap::new(),
        };
        writer.lay_out(stem, shard(planned, max_shard_bytes))?;
        Ok(writer)
    }

    /// Writes the elements of one planned tensor.
    ///
    /// # Errors
    /// [`Error::Io`]. Panics if the tensor was not planned, was written before, or has another size: a fault of this crate.
    pub fn put(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let place = self.places.remove(name);
        assert!(place.is_some(), "`{name}` is not planned or written twice");
        let Some((shard_idx, offset, len)) = place else {
            return Ok(());
        };
        assert_eq!(len, bytes.len() as u64, "size of `{name}`");
        let file = &mut self.shards[shard_idx];
        file.seek(SeekFrom::Start(offset))
            .and_then(|_| file.write_all(bytes))
            .map_err(Error::io("write", self.folder.path()))
    }

    /// Writes a whole file of the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn put_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.path().join(name);
        fs::write(&path, bytes).map_err(Error::io("write", path))
    }

    /// As `put_file`, for pretty JSON.
    pub fn put_json(&mut self, name: &str, json: &Value) -> Result<()> {
        self.put_file(name, format!("{json:#}\n").as_bytes())
    }

    /// Where files are gathered before `commit`.
    pub fn staging(&self) -> &Path {
        self.folder.path()
    }

    /// Swaps the folder for the old one, whose other files are kept, except an old model where this is one.
    ///
    /// # Errors
    /// [`Error::Io`]. Panics if a planned tensor was not written.
    pub fn commit(self) -> Result<()> {
        assert!(self.places.is_empty(), "unwritten: {:?}", self.places);
        drop(self.shards);
        let is_model = file_names(self.folder.path())?
            .iter()
            .any(|name| is_model_file(name));
        let keep = |name: &str| !(is_model && is_model_file(name));
        Ok(self.folder.replace_keeping(keep)?)
    }

    fn lay_out(&mut self, stem: &str, shards: Vec<Vec<Planned>>) -> Result<()> {
        let n_shards = shards.len();
        let mut weight_map = BTreeMap::new();
        let mut total_size = 0;
        for (shard_idx, mut tensors) in shards.into_iter().enumerate() {
            let file_name = match n_shards {
                1 => format!("{stem}.safetensors"),
                _ => format!("{stem}-{:05}-of-{n_shards:05}.safetensors", shard_idx + 1),
            };
            // Wide types first: every tensor then starts at a multiple of its element size, as upstream's writer has it.
            tensors.sort_by(|a, b| {
                (b.dtype.bitsize().cmp(&a.dtype.bitsize())).then_with(|| a.name.cmp(&b.name))
            });
            let header = header(&tensors);
            let path = self.folder.path().join(&file_name);
            let mut file = File::create(&path).map_err(Error::io("create", &path))?;
            file.write_all(&header).map_err(Error::io("write", &path))?;
            let mut offset = header.len() as u64;
            for tensor in tensors {
                let len = tensor.bytes();
                weight_map.insert(tensor.name.clone(), file_name.clone());
                self.places.insert(tensor.name, (shard_idx, offset, len));
                offset += len;
                total_size += len;
            }
            file.set_len(offset).map_err(Error::io("write", &path))?;
            self.shards.push(file);
        }
        if n_shards > 1 {
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
            self.put_json(&format!("{stem}.safetensors.index.json"), &index)?;
        }
        Ok(())
    }
}

/// `model.safetensors`, its index, or one of its numbered shards.
fn is_model_file(name: &str) -> bool {
    let numbered = name
        .strip_prefix("model-")
        .and_then(|rest| rest.strip_suffix(".safetensors"))
        .is_some_and(|middle| middle.contains("-of-"));
    numbered || name == "model.safetensors" || name == INDEX
}

fn file_names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).map_err(Error::io("list", dir))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(Error::io("list", dir))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Fills files in the given order up to the limit.
fn shard(planned: Vec<Planned>, max_shard_bytes: u64) -> Vec<Vec<Planned>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for tensor in planned {
        let len = tensor.bytes();
        if filled > 0 && filled + len > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += len;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

/// Length, JSON and padding of a safetensors file whose tensors follow each other in this order.
fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for tensor in tensors {
        let end = offset + tensor.bytes();
        entries.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// A folder whose index names `file`, beside a folder of whole weights `outside`.
    fn index_of(dir: &Path, file: &str) -> PathBuf {
        let folder = dir.join("model");
        fs::create_dir_all(&folder).unwrap();
        let planned = vec![Planned {
            name: "x".to_owned(),
            dtype: Dtype::F32,
            shape: vec![1],
        }];
        let mut writer = Writer::create(&dir.join("outside"), "model", planned, 100).unwrap();
        writer.put("x", &[0; 4]).unwrap();
        writer.commit().unwrap();
        let index = json!({"weight_map": {"x": file}}).to_string();
        fs::write(folder.join(INDEX), index).unwrap();
        folder
    }

    #[test]
    fn index_that_leads_out_of_its_folder_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let absolute = dir.path().join("outside/model.safetensors");
        for file in [
            "../outside/model.safetensors",
            absolute.to_str().unwrap(),
            "..\\outside\\model.safetensors",
            "..",
            "",
        ] {
            let folder = index_of(dir.path(), file);
            let error = Checkpoint::open(&folder).unwrap_err().to_string();
            assert!(error.contains("no plain file name"), "{error}");
            assert!(error.contains(INDEX), "{error}");
        }
        let folder = index_of(dir.path(), "a");
        fs::write(folder.join(INDEX), r#"{"weight_map": {"x": 3}}"#).unwrap();
        let error = Checkpoint::open(&folder).unwrap_err().to_string();
        assert!(error.contains("the file of `x` is 3"), "{error}");
    }

    #[test]
    fn index_that_names_something_else_than_a_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let folder = index_of(dir.path(), "weights");
        let error = || Checkpoint::open(&folder).unwrap_err().to_string();
        assert!(error().contains("`weights` is missing"), "{}", error());
        fs::create_dir(folder.join("weights")).unwrap();
        assert!(error().contains("weights: it is a folder"), "{}", error());
    }

    #[cfg(unix)]
    #[test]
    fn weights_that_are_a_device_or_a_link_to_one_are_refused_and_a_link_to_a_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let folder = index_of(dir.path(), "weights");
        let weights = folder.join("weights");
        std::os::unix::fs::symlink("/dev/zero", &weights).unwrap();
        let error = Checkpoint::open(&folder).unwrap_err().to_string();
        assert!(error.contains("weights: it is a device"), "{error}");
        fs::remove_file(&weights).unwrap();
        // As the Hub's cache has them.
        std::os::unix::fs::symlink(dir.path().join("outside/model.safetensors"), &weights).unwrap();
        assert!(Checkpoint::open(&folder).unwrap().get("x").is_some());
    }

    /// Elements of a type that are finite, and some that are not.
    fn check(dtype: Dtype, finite: &[&[u8]], others: &[&[u8]]) {
        let is_finite = |elements: &[&[u8]]| {
            view_is_finite(View {
                dtype,
                shape: &[elements.len()],
                bytes: &elements.concat(),
            })
        };
        assert!(is_finite(&[]), "{dtype}");
        assert!(is_finite(finite), "{dtype}");
        // At the start, in the midst, and in a piece behind the first.
        let many = finite.repeat((1 << 17) / finite.len());
        for &other in others {
            for place in [0, 1, many.len() - 1] {
                let mut elements = many.clone();
                elements[place] = other;
                assert!(!is_finite(&elements), "{dtype} {other:?} at {place}");
            }
        }
    }

    #[test]
    fn nan_and_infinities_of_every_type_are_found_in_its_bytes() {
        let [max, low, tiny] = [bf16::MAX, bf16::MIN, bf16::from_bits(1)].map(bf16::to_le_bytes);
        let bad = [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY].map(bf16::to_le_bytes);
        check(
            Dtype::BF16,
            &[&max, &low, &tiny],
            &bad.each_ref().map(|x| &x[..]),
        );
        let [max, low, tiny] = [f16::MAX, f16::MIN, f16::from_bits(1)].map(f16::to_le_bytes);
        let bad = [f16::NAN, f16::INFINITY, f16::NEG_INFINITY].map(f16::to_le_bytes);
        check(
            Dtype::F16,
            &[&max, &low, &tiny],
            &bad.each_ref().map(|x| &x[..]),
        );
        let [max, low, tiny] = [f32::MAX, f32::MIN, f32::from_bits(1)].map(f32::to_le_bytes);
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(f32::to_le_bytes);
        check(
            Dtype::F32,
            &[&max, &low, &tiny],
            &bad.each_ref().map(|x| &x[..]),
        );
        let [max, low, tiny] = [f64::MAX, f64::MIN, f64::from_bits(1)].map(f64::to_le_bytes);
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(f64::to_le_bytes);
        check(
            Dtype::F64,
            &[&max, &low, &tiny],
            &bad.each_ref().map(|x| &x[..]),
        );

        check(
            Dtype::F8_E4M3,
            &[&[0x7E], &[0xFE], &[0x80]],
            &[&[0x7F], &[0xFF]],
        );
        let bad: [&[u8]; 4] = [&[0x7C], &[0xFC], &[0x7F], &[0xFD]];
        check(Dtype::F8_E5M2, &[&[0x7B], &[0xFB], &[0x80]], &bad);
        check(Dtype::F8_E8M0, &[&[0], &[0xFE]], &[&[0xFF]]);
        check(Dtype::F8_E4M3FNUZ, &[&[0x7F], &[0xFF]], &[&[0x80]]);
        check(Dtype::F8_E5M2FNUZ, &[&[0x7F], &[0xFF]], &[&[0x80]]);
    }

    #[test]
    fn whole_numbers_are_finite() {
        for dtype in [
            Dtype::BOOL,
            Dtype::U8,
            Dtype::I16,
            Dtype::I32,
            Dtype::I64,
            Dtype::U64,
        ] {
            check(dtype, &[&[0xFF; 8], &[0x7F; 8]], &[]);
        }
    }
}
