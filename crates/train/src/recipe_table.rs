//! Tables of a recipe: a key's name, type, default and meaning stand once, and the struct, its defaults and the printed reference follow.

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

/// Declares the struct of a table: `/// meaning`, then `key: type = default` where the default as Rust is the default as TOML, or
/// `key: type = default => with_default "toml"` (or `optional "example"`) where it is not.
macro_rules! recipe_table {
    (
        $(#[$about:meta])*
        $name:ident as $table:literal {
            $( $(#[doc = $doc:literal])+ $(#[serde($serde:meta)])? $field:ident: $type:ty = $default:expr $(=> $kind:ident $toml:literal)?; )+
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
                ), )+
            ];
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
