//! Tables of a recipe: a key's name, type, default, range and meaning stand once, and the struct, its defaults, its check and the printed
//! reference follow.

use crate::error::{Error, Result};

/// A key of the recipe: dotted path, default (or an example where there is none) as TOML, meaning.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    /// The table's name and the key's, such as `optimizer.lr`.
    pub path: &'static str,
    /// As TOML.
    pub value: &'static str,
    /// Must be given; `value` is then an example.
    pub required: bool,
    /// Absent by default; `value` is then an example, printed as a comment.
    pub optional: bool,
    /// One line for people.
    pub doc: &'static str,
    /// The lowest and the highest value, for numbers.
    pub range: Option<[&'static str; 2]>,
}

impl Key {
    /// A key with a default.
    pub const fn with_default(path: &'static str, value: &'static str, doc: &'static str) -> Self {
        Key {
            path,
            value,
            required: false,
            optional: false,
            doc,
            range: None,
        }
    }

    /// The same with a range.
    pub const fn within(self, least: &'static str, most: &'static str) -> Self {
        Key {
            range: Some([least, most]),
            ..self
        }
    }

    /// A key that must be given.
    pub const fn required(path: &'static str, example: &'static str, doc: &'static str) -> Self {
        Key {
            required: true,
            ..Key::with_default(path, example, doc)
        }
    }

    /// A key that is absent by default.
    pub const fn optional(path: &'static str, example: &'static str, doc: &'static str) -> Self {
        Key {
            optional: true,
            ..Key::with_default(path, example, doc)
        }
    }
}

/// What a key of a range can be: a number, one that may be absent, or several.
pub(crate) trait Ranged {
    /// The first number that is not in the range, as text.
    fn beyond(&self, least: f64, most: f64) -> Option<String>;
}

impl Ranged for f64 {
    fn beyond(&self, least: f64, most: f64) -> Option<String> {
        // NaN is in no range.
        (!(least..=most).contains(self)).then(|| self.to_string())
    }
}

impl Ranged for f32 {
    fn beyond(&self, least: f64, most: f64) -> Option<String> {
        // As it was written: 0.1 rather than 0.10000000149011612.
        f64::from(*self)
            .beyond(least, most)
            .map(|_| self.to_string())
    }
}

impl Ranged for u64 {
    fn beyond(&self, least: f64, most: f64) -> Option<String> {
        (*self as f64).beyond(least, most).map(|_| self.to_string())
    }
}

impl Ranged for usize {
    fn beyond(&self, least: f64, most: f64) -> Option<String> {
        (*self as u64).beyond(least, most)
    }
}

impl<T: Ranged> Ranged for Option<T> {
    fn beyond(&self, least: f64, most: f64) -> Option<String> {
        self.as_ref()?.beyond(least, most)
    }
}

/// Refuses a value that is not in its range.
///
/// # Errors
/// [`Error::BadValue`] with the key and the range.
pub(crate) fn check(
    key: &'static str,
    value: &impl Ranged,
    [least, most]: [&'static str; 2],
    expected: &'static str,
) -> Result<()> {
    let [least, most] = [least, most].map(|bound| bound.parse().unwrap_or(f64::NAN));
    assert!(least <= most, "a range that is none: {key} {expected}");
    match value.beyond(least, most) {
        None => Ok(()),
        Some(value) => Err(Error::BadValue {
            key,
            value,
            expected,
        }),
    }
}

/// Declares the struct of a table: `/// meaning`, then `key: type = default` where the default as Rust is the default as TOML, or
/// `key: type = default => with_default "toml"` (or `optional "example"`) where it is not; then `, from 1 to 100` for a number that has a range.
macro_rules! recipe_table {
    (
        $(#[$about:meta])*
        $name:ident as $table:literal {
            $( $(#[doc = $doc:literal])+ $(#[serde($serde:meta)])? $field:ident: $type:ty = $default:expr $(=> $kind:ident $toml:literal)? $(, from $least:literal to $most:literal)?; )+
        }
    ) => {
        $(#[$about])*
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $(
                $(#[doc = $doc])+
                $(#[serde($serde)])?
                pub $field: $type,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                $name { $( $field: $default, )+ }
            }
        }

        impl $name {
            /// The keys, in the order of the reference.
            pub const KEYS: &'static [$crate::recipe_table::Key] = &[
                $( recipe_table!(@key
                    concat!($table, ".", stringify!($field)), concat!($($doc),+).trim_ascii(), $default $(, $kind $toml)?
                ) $(.within(stringify!($least), stringify!($most)))?, )+
            ];

            /// Refuses numbers that no run can have.
            ///
            /// # Errors
            /// [`crate::Error::BadValue`] with the key and its range.
            pub(crate) fn check_ranges(&self) -> $crate::error::Result<()> {
                $( $( $crate::recipe_table::check(
                    concat!($table, ".", stringify!($field)),
                    &self.$field,
                    [stringify!($least), stringify!($most)],
                    concat!("from ", stringify!($least), " to ", stringify!($most)),
                )?; )? )+
                Ok(())
            }
        }
    };
    (@key $path:expr, $doc:expr, $default:expr) => {
        $crate::recipe_table::Key::with_default($path, stringify!($default), $doc)
    };
    (@key $path:expr, $doc:expr, $default:expr, $kind:ident $toml:literal) => {
        $crate::recipe_table::Key::$kind($path, $toml, $doc)
    };
}
pub(crate) use recipe_table;
