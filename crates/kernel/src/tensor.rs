//! A dense row-major tensor that owns its memory; ops take tensors whole and write into ones the caller allocated.

use half::bf16;
use rayon::prelude::*;

use crate::cuda::{Args, Buffer};
use crate::device::Device;
use crate::dtype::DType;
use crate::{Error, Result};

/// Elements that one thread sets to zero at a time.
const FILL_PIECE: usize = 1 << 18;

/// Dense, row-major, contiguous. Shapes are part of every op's doc as a suffix: `x_td` is [T, D].
#[derive(Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

/// The elements of a tensor, by place and type. Public so that readers and writers of files can match on it.
#[derive(Debug)]
pub enum Storage {
    /// f32 on the host.
    F32(Vec<f32>),
    /// bf16 on the host.
    Bf16(Vec<bf16>),
    /// On a GPU; the buffer may be larger than the elements need.
    Cuda(Buffer, DType),
}

impl Tensor {
    /// All zeros, on the host.
    pub fn zeros(shape: &[usize], dtype: DType) -> Self {
        let n = shape.iter().product();
        let storage = match dtype {
            DType::F32 => Storage::F32(vec![0.0; n]),
            DType::Bf16 => Storage::Bf16(vec![bf16::ZERO; n]),
        };
        Tensor {
            shape: shape.to_vec(),
            storage,
        }
    }

    /// All zeros, on `device`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub fn zeros_on(shape: &[usize], dtype: DType, device: Device) -> Result<Self> {
        if device == Device::Cpu {
            return Ok(Tensor::zeros(shape, dtype));
        }
        let mut tensor = Tensor::empty_on(device, dtype);
        tensor.resize(shape)?;
        tensor.fill_zero()?;
        Ok(tensor)
    }

    /// No elements yet, on `device`: for [`Tensor::resize`].
    pub fn empty_on(device: Device, dtype: DType) -> Self {
        match device {
            Device::Cpu => Tensor::zeros(&[0], dtype),
            Device::Cuda(cuda) => Tensor {
                shape: vec![0],
                storage: Storage::Cuda(Buffer::empty(cuda), dtype),
            },
        }
    }

    /// All NaN: what tests hand in as an output, so that an element nobody wrote is noticed.
    pub fn poison(shape: &[usize], dtype: DType) -> Self {
        let mut tensor = Tensor::zeros(shape, dtype);
        match &mut tensor.storage {
            Storage::F32(data) => data.fill(f32::NAN),
            Storage::Bf16(data) => data.fill(bf16::NAN),
            Storage::Cuda(..) => unreachable!("made on the host"),
        }
        tensor
    }

    /// Takes `data` as the elements. Panics if its length is not the product of `shape`.
    pub fn from_f32(shape: &[usize], data: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{shape:?}");
        Tensor {
            shape: shape.to_vec(),
            storage: Storage::F32(data),
        }
    }

    /// Takes `data` as the elements. Panics if its length is not the product of `shape`.
    pub fn from_bf16(shape: &[usize], data: Vec<bf16>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len(), "{shape:?}");
        Tensor {
            shape: shape.to_vec(),
            storage: Storage::Bf16(data),
        }
    }

    /// The dims, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// How elements are stored.
    pub fn dtype(&self) -> DType {
        match self.storage {
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
            Storage::Cuda(_, dtype) => dtype,
        }
    }

    /// Where the elements lie.
    pub fn device(&self) -> Device {
        match &self.storage {
            Storage::F32(_) | Storage::Bf16(_) => Device::Cpu,
            Storage::Cuda(buffer, _) => Device::Cuda(buffer.cuda()),
        }
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.numel() * self.dtype().size()
    }

    /// The elements, by place and type.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// The elements, to be written.
    pub fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    /// The elements, if they are f32 on the host. Panics otherwise: the caller stated place and dtype when it made the tensor.
    pub fn f32s(&self) -> &[f32] {
        match &self.storage {
            Storage::F32(data) => data,
            _ => panic!("f32s() of a {} tensor on {}", self.dtype(), self.device()),
        }
    }

    /// The elements, if they are f32 on the host. Panics otherwise.
    pub fn f32s_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::F32(data) => data,
            _ => panic!("f32s_mut() of a tensor that is not f32 on the host"),
        }
    }

    /// A copy of the elements as f32, from a tensor on the host. Panics for one on a GPU: see [`Tensor::read_f32`].
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match &self.storage {
            Storage::F32(data) => data.clone(),
            Storage::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            Storage::Cuda(..) => panic!("to_f32_vec() of a tensor on {}", self.device()),
        }
    }

    /// A copy of the elements as f32, wherever they are; waits for the work that makes them.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU failed.
    pub fn read_f32(&self) -> Result<Vec<f32>> {
        match &self.storage {
            Storage::Cuda(..) => Ok(self.to_device(Device::Cpu)?.to_f32_vec()),
            _ => Ok(self.to_f32_vec()),
        }
    }

    /// A copy on `device`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Cuda`] if the GPU failed.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let mut copy = Tensor::empty_on(device, self.dtype());
        copy.resize(&self.shape)?;
        copy.copy_from(self)?;
        Ok(copy)
    }

    /// Takes over the elements of a tensor of the same shape and dtype, across devices.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::DType`] where they differ; [`Error::Cuda`] if the GPU failed.
    pub fn copy_from(&mut self, source: &Tensor) -> Result<()> {
        const OP: &str = "copy";
        if source.shape != self.shape {
            return Err(Error::Shape {
                op: OP,
                arg: "source",
                expected: format!("{:?}", self.shape),
                got: format!("{:?}", source.shape),
            });
        }
        if source.dtype() != self.dtype() {
            return Err(Error::DType {
                op: OP,
                arg: "source",
                expected: if self.dtype() == DType::F32 {
                    "f32"
                } else {
                    "bf16"
                },
                got: source.dtype(),
            });
        }
        let bytes = self.bytes();
        match (&mut self.storage, &source.storage) {
            (Storage::F32(to), Storage::F32(from)) => to.copy_from_slice(from),
            (Storage::Bf16(to), Storage::Bf16(from)) => to.copy_from_slice(from),
            (Storage::Cuda(to, _), Storage::F32(from)) => to.write(bytemuck::cast_slice(from))?,
            (Storage::Cuda(to, _), Storage::Bf16(from)) => to.write(bytemuck::cast_slice(from))?,
            (Storage::F32(to), Storage::Cuda(from, _)) => {
                from.read(bytemuck::cast_slice_mut(to))?
            }
            (Storage::Bf16(to), Storage::Cuda(from, _)) => {
                from.read(bytemuck::cast_slice_mut(to))?
            }
            (Storage::Cuda(to, _), Storage::Cuda(from, _)) => to.copy_from(from, bytes)?,
            (Storage::F32(_), Storage::Bf16(_)) | (Storage::Bf16(_), Storage::F32(_)) => {
                unreachable!("dtypes were compared")
            }
        }
        Ok(())
    }

    /// The same values in another storage type (bf16: rounded to nearest even), on the host.
    pub fn to_dtype(&self, dtype: DType) -> Self {
        if dtype == self.dtype() {
            return self.clone();
        }
        let values = self.to_f32_vec();
        match dtype {
            DType::F32 => Tensor::from_f32(&self.shape, values),
            DType::Bf16 => Tensor::from_bf16(
                &self.shape,
                values.into_iter().map(bf16::from_f32).collect(),
            ),
        }
    }

    /// Changes the shape, not the elements. Panics if the element count differs.
    pub fn reshape(&mut self, shape: &[usize]) {
        assert_eq!(shape.iter().product::<usize>(), self.numel(), "{shape:?}");
        self.shape = shape.to_vec();
    }

    /// Gives the tensor a new shape, keeping its allocation where it is large enough; the contents are unspecified.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] on a GPU; the tensor then has no elements.
    pub fn resize(&mut self, shape: &[usize]) -> Result<()> {
        let n: usize = shape.iter().product();
        match &mut self.storage {
            Storage::F32(data) => data.resize(n, 0.0),
            Storage::Bf16(data) => data.resize(n, bf16::ZERO),
            Storage::Cuda(buffer, dtype) => {
                let bytes = n * dtype.size();
                if buffer.bytes() < bytes {
                    let cuda = buffer.cuda();
                    self.shape = vec![0];
                    // The old memory goes first, so that both never exist at once.
                    *buffer = Buffer::empty(cuda);
                    *buffer = Buffer::new(cuda, bytes)?;
                }
            }
        }
        self.shape = shape.to_vec();
        Ok(())
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// [`Error::Cuda`] if the GPU failed.
    pub fn fill_zero(&mut self) -> Result<()> {
        let bytes = self.bytes();
        match &mut self.storage {
            Storage::F32(data) => data
                .par_chunks_mut(FILL_PIECE)
                .for_each(|data| data.fill(0.0)),
            Storage::Bf16(data) => data
                .par_chunks_mut(FILL_PIECE)
                .for_each(|data| data.fill(bf16::ZERO)),
            Storage::Cuda(buffer, _) => buffer.fill(0, bytes)?,
        }
        Ok(())
    }

    /// Address on the GPU. Panics for a tensor on the host: ops compare devices first.
    pub(crate) fn device_pointer(&self) -> u64 {
        match &self.storage {
            Storage::Cuda(buffer, _) => buffer.pointer(),
            _ => panic!("device pointer of a tensor on the host"),
        }
    }
}

impl Clone for Tensor {
    /// Panics for a tensor on a GPU, where a copy can fail: see [`Tensor::to_device`].
    fn clone(&self) -> Self {
        let storage = match &self.storage {
            Storage::F32(data) => Storage::F32(data.clone()),
            Storage::Bf16(data) => Storage::Bf16(data.clone()),
            Storage::Cuda(..) => panic!("clone() of a tensor on {}", self.device()),
        };
        Tensor {
            shape: self.shape.clone(),
            storage,
        }
    }
}

impl PartialEq for Tensor {
    /// Same shape, dtype and elements, both on the host; tensors on a GPU are never equal.
    fn eq(&self, other: &Self) -> bool {
        self.shape == other.shape
            && match (&self.storage, &other.storage) {
                (Storage::F32(a), Storage::F32(b)) => a == b,
                (Storage::Bf16(a), Storage::Bf16(b)) => a == b,
                _ => false,
            }
    }
}

/// Tensors on a GPU as arguments of its kernels.
impl Args {
    /// `View`, read only.
    pub(crate) fn view(self, tensor: &Tensor) -> Args {
        self.view_at(tensor.device_pointer(), tensor.dtype())
    }

    /// `View`, written.
    pub(crate) fn view_mut(self, tensor: &mut Tensor) -> Args {
        self.view(tensor)
    }

    /// `View` that is null where there is no tensor.
    pub(crate) fn view_or_null(self, tensor: Option<&Tensor>) -> Args {
        match tensor {
            Some(tensor) => self.view(tensor),
            None => self.view_at(0, DType::F32),
        }
    }

    /// `T*` of a kernel that fixes the dtype.
    pub(crate) fn tensor(self, tensor: &Tensor) -> Args {
        self.pointer(tensor.device_pointer())
    }

    /// `T*`, written.
    pub(crate) fn tensor_mut(self, tensor: &mut Tensor) -> Args {
        self.pointer(tensor.device_pointer())
    }
}
