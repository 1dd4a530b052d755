//! Which algorithm was fastest for a product on this GPU, kept on disk beside the compiled kernels.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::{Cuda, kernel_cache};

/// A matrix product's algorithm as cuBLASLt stores it.
pub(super) type Algorithm = [u64; 8];

/// By the product's name. The file has a line for each: the name, then eight words in hexadecimal.
#[derive(Debug)]
pub(super) struct Choices {
    path: Option<PathBuf>,
    by_product: BTreeMap<String, Algorithm>,
}

impl Choices {
    /// What earlier runs chose on this GPU with this version of the library; nothing without a cache or a readable file.
    pub fn read(cuda: Cuda, version: usize) -> Self {
        let path = kernel_cache().map(|dir| {
            let gpu: String = cuda
                .name()
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
                .collect();
            dir.join(format!("products-{gpu}-{version}.txt"))
        });
        let text = path.as_ref().and_then(|path| fs::read_to_string(path).ok());
        let by_product = text.as_deref().map(parse).unwrap_or_default();
        Choices { path, by_product }
    }

    /// Of this process alone.
    #[cfg(test)]
    pub fn in_memory() -> Self {
        Choices {
            path: None,
            by_product: BTreeMap::new(),
        }
    }

    /// Whether a later run will find what this one chooses.
    pub fn are_kept(&self) -> bool {
        self.path.is_some()
    }

    pub fn get(&self, product: &str) -> Option<Algorithm> {
        self.by_product.get(product).copied()
    }

    /// Remembers it, on disk too, beside what other processes have put there. A cache that cannot be written costs time at the next
    /// start, nothing else.
    pub fn put(&mut self, product: String, algorithm: Algorithm) {
        self.by_product.insert(product, algorithm);
        if let Some(path) = &self.path {
            let text = fs::read_to_string(path).unwrap_or_default();
            for (product, algorithm) in parse(&text) {
                self.by_product.entry(product).or_insert(algorithm);
            }
            let _ = files::write(path, format(&self.by_product).as_bytes());
        }
    }
}

fn format(by_product: &BTreeMap<String, Algorithm>) -> String {
    let mut text = String::new();
    for (product, words) in by_product {
        text.push_str(product);
        for word in words {
            text.push_str(&std::format!(" {word:016x}"));
        }
        text.push('\n');
    }
    text
}

/// Lines that are not whole are left out.
fn parse(text: &str) -> BTreeMap<String, Algorithm> {
    text.lines()
        .filter_map(|line| {
            let mut parts = line.split(' ');
            let product = parts.next()?.to_owned();
            let words: Option<Vec<u64>> = parts
                .map(|word| {
                    let whole = word.len() == 16;
                    u64::from_str_radix(word, 16).ok().filter(|_| whole)
                })
                .collect();
            Some((product, words?.try_into().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_a_broken_line_is_left_out() {
        let algorithm = [1, u64::MAX, 0, 7, 8, 9, 10, 11];
        let by_product = BTreeMap::from([
            ("2x3x4".to_owned(), algorithm),
            ("5x6x7".to_owned(), [0; 8]),
        ]);
        let text = format(&by_product);
        assert_eq!(parse(&text), by_product);
        let cut = &text[..text.len() - 5];
        assert_eq!(parse(cut).len(), 1);
        assert_eq!(parse("2x3x4 1 2 3\n\nx y"), BTreeMap::new());
    }
}
