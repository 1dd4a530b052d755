//! Files and folders that are old or new at every instant, however the program ends; names and files from outside; files that are no links to others; room on a disk; copies, SHA-256 and hex.
//!
//! What is written lies beside its place until it is whole and on the disk; one rename then puts it there. What a killed process left
//! beside it is free to be taken again, which a lock's file beside it tells, and goes with the next write of the same name or with [`clear_leftovers`].

mod disk;
mod error;
mod file;
mod folder;
mod hash;
mod name;
pub mod outside;
mod plain;
mod relative;
mod slot;
mod sums;
mod sync;

pub use disk::disk_free;
pub use error::{Error, Result};
pub use file::{NewFile, copy, write};
pub use folder::{NewFolder, folder_bytes, link_files, move_folder, remove_folder, tree_bytes};
pub use hash::{digest_file, hex, sha256, sha256_of};
pub use name::{FileName, NoFileName};
pub use plain::{move_file, open_plain};
pub use relative::relative;
pub use slot::clear_leftovers;
pub use sums::{Damage, Problem, SUMS, Wholeness, check_sums, sha256_of_files, write_sums};
pub use sync::{sync_folder, sync_tree};
