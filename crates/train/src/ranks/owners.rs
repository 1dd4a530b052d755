//! Which rank keeps the moments of which tensor, and updates it: whole tensors, so that no tensor's bytes are cut.

/// The owner of each trainable tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    rank: usize,
    /// In the order of the tensors.
    of: Vec<usize>,
}

impl Owners {
    /// Assigns tensors of these sizes (elements) to `n_ranks`, the largest first, each to the rank that has least so far: no rank has
    /// more than the mean and one tensor. The same on every rank; `rank` is the one that asks.
    pub fn assign(sizes: &[usize], rank: usize, n_ranks: usize) -> Self {
        let mut largest_first: Vec<usize> = (0..sizes.len()).collect();
        largest_first.sort_by_key(|tensor| (std::cmp::Reverse(sizes[*tensor]), *tensor));
        let mut load = vec![0; n_ranks];
        let mut of = vec![0; sizes.len()];
        for tensor in largest_first {
            let least = (0..n_ranks)
                .min_by_key(|rank| (load[*rank], *rank))
                .unwrap_or(0);
            of[tensor] = least;
            load[least] += sizes[tensor];
        }
        Owners { rank, of }
    }

    /// Whether the rank that asked owns this tensor.
    pub fn has(&self, tensor: usize) -> bool {
        self.of[tensor] == self.rank
    }

    /// Owners in the order of the tensors.
    pub fn ranks(&self) -> &[usize] {
        &self.of
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(sizes: &[usize], n_ranks: usize) -> Vec<usize> {
        let owners = Owners::assign(sizes, 0, n_ranks);
        (0..n_ranks)
            .map(|rank| {
                let owned = owners.ranks().iter().zip(sizes);
                owned.filter(|(of, _)| **of == rank).map(|(_, n)| n).sum()
            })
            .collect()
    }

    #[test]
    fn every_tensor_has_one_owner_and_the_load_is_even() {
        for (sizes, n_ranks, expect) in [
            (vec![5, 1, 4, 2, 3], 1, vec![15]),
            (vec![5, 1, 4, 2, 3], 2, vec![8, 7]),
            (vec![5, 1, 4, 2, 3], 3, vec![5, 5, 5]),
            (vec![7, 7], 4, vec![7, 7, 0, 0]),
            (vec![], 2, vec![0, 0]),
        ] {
            assert_eq!(loads(&sizes, n_ranks), expect, "{sizes:?} to {n_ranks}");
        }
    }

    #[test]
    fn shapes_of_a_real_model_are_assigned_within_a_tenth_of_the_mean() {
        // 4B: an embedding, then 32 layers of one large and many small tensors.
        let mut sizes = vec![248_320 * 2560];
        for _ in 0..32 {
            sizes.extend([9728 * 2560; 3]);
            sizes.extend([8192 * 2560, 4096 * 2560, 2560 * 4096, 2560, 2560, 32]);
        }
        for n_ranks in [2, 3, 4] {
            let loads = loads(&sizes, n_ranks);
            let mean = sizes.iter().sum::<usize>() / n_ranks;
            let most = loads.into_iter().max().unwrap();
            assert!(most - mean < mean / 10, "{n_ranks} ranks: {most} of {mean}");
        }
    }

    #[test]
    fn all_ranks_assign_alike() {
        let sizes = [3, 3, 3, 9, 1];
        for rank in 0..3 {
            let owners = Owners::assign(&sizes, rank, 3);
            assert_eq!(owners.ranks(), Owners::assign(&sizes, 0, 3).ranks());
            for tensor in 0..sizes.len() {
                assert_eq!(owners.has(tensor), owners.ranks()[tensor] == rank);
            }
        }
    }
}
