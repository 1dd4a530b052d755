//! Structs of activations that are allocated, resized and counted by the same lines.

/// Declares a struct of tensors whose shapes follow from the config `c` and the token count `t`, so that the same lines
/// allocate, resize and predict. Types: `act` is the model's storage type, `f32` is always f32.
macro_rules! arena {
    (
        $(#[$about:meta])*
        $name:ident($c:ident, $t:ident) {
            $( $(#[$doc:meta])* $field:ident: $kind:ident [$($dim:expr),+], )+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug)]
        pub(crate) struct $name {
            $( $(#[$doc])* pub $field: kernel::Tensor, )+
        }

        #[allow(dead_code, reason = "not every arena is counted or looked into")]
        impl $name {
            #[allow(unused_variables, reason = "some arenas are f32 throughout")]
            pub fn new(dtype: kernel::DType, device: kernel::Device) -> Self {
                $name { $( $field: kernel::Tensor::empty_on(device, arena!(@dtype $kind, dtype)), )+ }
            }

            /// Gives every tensor its shape for `t` tokens; contents are unspecified.
            pub fn resize(&mut self, $c: &crate::config::Config, $t: usize) -> crate::Result<()> {
                $( self.$field.resize(&[$($dim),+])?; )+
                Ok(())
            }

            /// Bytes of a GPU behind what `resize` will need.
            #[allow(unused_variables, reason = "some arenas are f32 throughout")]
            pub fn bytes_for($c: &crate::config::Config, $t: usize, dtype: kernel::DType) -> usize {
                0 $( + kernel::cuda::footprint(arena!(@dtype $kind, dtype).size() * [$($dim),+].iter().product::<usize>()) )+
            }

            /// Every tensor by name.
            pub fn tensors(&self) -> Vec<(&'static str, &kernel::Tensor)> {
                vec![ $( (stringify!($field), &self.$field), )+ ]
            }
        }
    };
    (@dtype act, $dtype:ident) => { $dtype };
    (@dtype f32, $dtype:ident) => { kernel::DType::F32 };
}
pub(crate) use arena;
