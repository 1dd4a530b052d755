//! A dense row-major tensor that owns its memory; ops take tensors whole and write into ones the caller allocated.

use half::bf16;

use crate::dtype::DType;

/// Dense, row-major, contiguous. Shapes are part of every op's doc as a suffix: `x_td` is [T, D].
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Storage,
}

/// The elements of a tensor, by type. Public so that readers and writers of files can match on it.
#[derive(Debug, Clone, PartialEq)]
pub enum Storage {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Tensor {
    /// All zeros.
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

    /// All NaN: what tests hand in as an output, so that an element nobody wrote is noticed.
    pub fn poison(shape: &[usize], dtype: DType) -> Self {
        let mut tensor = Tensor::zeros(shape, dtype);
        match &mut tensor.storage {
            Storage::F32(data) => data.fill(f32::NAN),
            Storage::Bf16(data) => data.fill(bf16::NAN),
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

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn dtype(&self) -> DType {
        match self.storage {
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
        }
    }

    pub fn bytes(&self) -> usize {
        self.numel() * self.dtype().size()
    }

    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    pub fn storage_mut(&mut self) -> &mut Storage {
        &mut self.storage
    }

    /// The elements, if they are f32. Panics otherwise: the caller stated the dtype when it made the tensor.
    pub fn f32s(&self) -> &[f32] {
        match &self.storage {
            Storage::F32(data) => data,
            Storage::Bf16(_) => panic!("f32s() of a bf16 tensor"),
        }
    }

    /// The elements, if they are f32. Panics otherwise.
    pub fn f32s_mut(&mut self) -> &mut [f32] {
        match &mut self.storage {
            Storage::F32(data) => data,
            Storage::Bf16(_) => panic!("f32s_mut() of a bf16 tensor"),
        }
    }

    /// A copy of the elements as f32, whatever the storage.
    pub fn to_f32_vec(&self) -> Vec<f32> {
        match &self.storage {
            Storage::F32(data) => data.clone(),
            Storage::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
        }
    }

    /// The same values in another storage type (bf16: rounded to nearest even).
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
    pub fn resize(&mut self, shape: &[usize]) {
        let n = shape.iter().product();
        match &mut self.storage {
            Storage::F32(data) => data.resize(n, 0.0),
            Storage::Bf16(data) => data.resize(n, bf16::ZERO),
        }
        self.shape = shape.to_vec();
    }

    /// Sets every element to zero.
    pub fn fill_zero(&mut self) {
        match &mut self.storage {
            Storage::F32(data) => data.fill(0.0),
            Storage::Bf16(data) => data.fill(bf16::ZERO),
        }
    }
}
