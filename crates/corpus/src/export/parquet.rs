//! A writer for Parquet files: PLAIN values, one snappy-compressed page for each column of a row group.
//! Ours because the `parquet` crate without Arrow still adds seven crates and most of a minute of compiling to a program
//! that writes one schema; the tests read the files back with that crate.
//! Source: the Apache Parquet format specification 2.x (README.md, Encodings.md, parquet.thrift).

use super::thrift::{self, push_varint};

const MAGIC: &[u8] = b"PAR1";
const CREATED_BY: &str = concat!("cyrene version ", env!("CARGO_PKG_VERSION"));

/// Numbers of parquet.thrift.
const DATA_PAGE: i32 = 0;
const PLAIN: i32 = 0;
const RLE: i32 = 3;
const SNAPPY: i32 = 1;
const UTF8: i32 = 0;
const LIST: i32 = 3;

/// How often a node of the schema stands in its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Times {
    Once = 0,
    OnceOrNot = 1,
    Often = 2,
}

/// What a leaf holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leaf {
    Int32 = 1,
    Int64 = 2,
    /// UTF-8.
    Text = 6,
}

/// A node of the schema.
#[derive(Debug)]
pub(super) struct Node {
    name: &'static str,
    times: Times,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Leaf(Leaf),
    Group { is_list: bool, nodes: Vec<Node> },
}

impl Node {
    pub fn leaf(name: &'static str, times: Times, leaf: Leaf) -> Node {
        let content = Content::Leaf(leaf);
        Node {
            name,
            times,
            content,
        }
    }

    pub fn group(name: &'static str, times: Times, nodes: Vec<Node>) -> Node {
        let is_list = false;
        Node {
            name,
            times,
            content: Content::Group { is_list, nodes },
        }
    }

    /// A list of structures, in the three levels that the specification asks for.
    pub fn list(name: &'static str, nodes: Vec<Node>) -> Node {
        let element = Node::group("element", Times::Once, nodes);
        let nodes = vec![Node::group("list", Times::Often, vec![element])];
        let content = Content::Group {
            is_list: true,
            nodes,
        };
        Node {
            name,
            times: Times::Once,
            content,
        }
    }

    /// The node and all below it, parents first.
    fn walk<'a>(&'a self, f: &mut impl FnMut(&'a Node)) {
        f(self);
        if let Content::Group { nodes, .. } = &self.content {
            nodes.iter().for_each(|node| node.walk(f));
        }
    }

    /// The leaves with their path and how many optional and how many repeated nodes lead to them.
    fn leaves<'a>(
        &'a self,
        path: &[&'a str],
        mut depth: i16,
        mut repeats: i16,
        out: &mut Vec<Place<'a>>,
    ) {
        depth += i16::from(self.times != Times::Once);
        repeats += i16::from(self.times == Times::Often);
        let path = [path, &[self.name]].concat();
        match &self.content {
            Content::Leaf(leaf) => out.push(Place {
                path,
                leaf: *leaf,
                depth,
                repeats,
            }),
            Content::Group { nodes, .. } => nodes
                .iter()
                .for_each(|node| node.leaves(&path, depth, repeats, out)),
        }
    }
}

/// Where a column stands in the schema.
struct Place<'a> {
    path: Vec<&'a str>,
    leaf: Leaf,
    /// The definition level of a value, and the highest repetition level.
    depth: i16,
    repeats: i16,
}

/// The entries of a column in a row group.
#[derive(Debug, Default, Clone)]
pub(super) struct Column {
    /// PLAIN: little-endian numbers; texts behind their length in four bytes.
    values: Vec<u8>,
    definitions: Levels,
    repetitions: Levels,
    n_entries: usize,
}

/// Levels as runs of (how often, which).
#[derive(Debug, Default, Clone)]
struct Levels(Vec<(u64, i16)>);

impl Levels {
    fn push(&mut self, level: i16) {
        match self.0.last_mut() {
            Some((n, last)) if *last == level => *n += 1,
            _ => self.0.push((1, level)),
        }
    }

    /// The hybrid encoding with runs only, behind its length.
    fn encode(&self, out: &mut Vec<u8>) {
        let mut bytes = Vec::new();
        for (n, level) in &self.0 {
            push_varint(&mut bytes, n << 1);
            bytes.push(*level as u8);
        }
        out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        out.extend_from_slice(&bytes);
    }
}

impl Column {
    /// `depth` is the number of optional and repeated nodes that are there; `repeats` the repeated node that goes on
    /// (0: a new row).
    pub fn text(&mut self, value: &str, depth: i16, repeats: i16) {
        self.values
            .extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.values.extend_from_slice(value.as_bytes());
        self.absent(depth, repeats);
    }

    pub fn i32(&mut self, value: i32, depth: i16, repeats: i16) {
        self.values.extend_from_slice(&value.to_le_bytes());
        self.absent(depth, repeats);
    }

    pub fn i64(&mut self, value: i64, depth: i16, repeats: i16) {
        self.values.extend_from_slice(&value.to_le_bytes());
        self.absent(depth, repeats);
    }

    /// An entry without a value: an empty list, or an optional value that is not there.
    pub fn absent(&mut self, depth: i16, repeats: i16) {
        self.definitions.push(depth);
        self.repetitions.push(repeats);
        self.n_entries += 1;
    }

    fn page(&self, place: &Place<'_>) -> Vec<u8> {
        let mut page = Vec::with_capacity(self.values.len() + 64);
        if place.repeats > 0 {
            self.repetitions.encode(&mut page);
        }
        if place.depth > 0 {
            self.definitions.encode(&mut page);
        }
        page.extend_from_slice(&self.values);
        page
    }
}

/// What the footer says of a column of a row group.
struct Chunk {
    offset: i64,
    n_entries: i64,
    plain_bytes: i64,
    bytes: i64,
}

/// A file on its way: gives bytes to be written one after another.
pub(super) struct File {
    schema: Node,
    groups: Vec<(i64, Vec<Chunk>)>,
    n_bytes: i64,
}

/// A page does not fit into the 2 GiB that its header can say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageTooLong;

impl File {
    pub fn new(columns: Vec<Node>) -> File {
        File {
            schema: Node::group("row", Times::Once, columns),
            groups: Vec::new(),
            n_bytes: 0,
        }
    }

    /// The bytes the file begins with.
    pub fn begin(&mut self) -> &'static [u8] {
        self.n_bytes = MAGIC.len() as i64;
        MAGIC
    }

    /// The bytes of a row group; the columns are in the order of the schema's leaves.
    pub fn row_group(
        &mut self,
        n_rows: usize,
        columns: &[&Column],
    ) -> Result<Vec<u8>, PageTooLong> {
        let mut leaves = Vec::new();
        self.leaves(&mut leaves);
        assert_eq!(leaves.len(), columns.len(), "a column for each leaf");
        let mut out = Vec::new();
        let mut chunks = Vec::new();
        for (place, column) in leaves.iter().zip(columns) {
            let page = column.page(place);
            let packed = snap::raw::Encoder::new()
                .compress_vec(&page)
                .map_err(|_| PageTooLong)?;
            let length = |bytes: &[u8]| i32::try_from(bytes.len()).map_err(|_| PageTooLong);
            let mut header = thrift::Writer::default();
            header.i32(1, DATA_PAGE);
            header.i32(2, length(&page)?);
            header.i32(3, length(&packed)?);
            header.structure(5, |page| {
                page.i32(1, column.n_entries as i32);
                page.i32(2, PLAIN);
                page.i32(3, RLE);
                page.i32(4, RLE);
            });
            let header = header.finish();
            chunks.push(Chunk {
                offset: self.n_bytes + out.len() as i64,
                n_entries: column.n_entries as i64,
                plain_bytes: (header.len() + page.len()) as i64,
                bytes: (header.len() + packed.len()) as i64,
            });
            out.extend_from_slice(&header);
            out.extend_from_slice(&packed);
        }
        self.n_bytes += out.len() as i64;
        self.groups.push((n_rows as i64, chunks));
        Ok(out)
    }

    /// The bytes the file ends with; `notes` are keys and values that readers show as metadata.
    pub fn end(&self, notes: &[(&str, &str)]) -> Vec<u8> {
        let mut leaves = Vec::new();
        self.leaves(&mut leaves);
        let mut nodes = Vec::new();
        self.schema.walk(&mut |node| nodes.push(node));
        let mut footer = thrift::Writer::default();
        footer.i32(1, 1);
        footer.structures(2, &nodes, |out, node| {
            let is_root = std::ptr::eq(*node, &self.schema);
            write_node(out, node, is_root);
        });
        footer.i64(3, self.groups.iter().map(|(n_rows, _)| n_rows).sum());
        footer.structures(4, &self.groups, |out, (n_rows, chunks)| {
            let pairs: Vec<_> = leaves.iter().zip(chunks).collect();
            out.structures(1, &pairs, |out, (place, chunk)| {
                write_chunk(out, place, chunk)
            });
            out.i64(2, chunks.iter().map(|c| c.plain_bytes).sum());
            out.i64(3, *n_rows);
        });
        footer.structures(5, notes, |out, (key, value)| {
            out.text(1, key);
            out.text(2, value);
        });
        footer.text(6, CREATED_BY);
        let mut out = footer.finish();
        out.extend_from_slice(&(out.len() as u32).to_le_bytes());
        out.extend_from_slice(MAGIC);
        out
    }

    fn leaves<'a>(&'a self, out: &mut Vec<Place<'a>>) {
        if let Content::Group { nodes, .. } = &self.schema.content {
            nodes.iter().for_each(|node| node.leaves(&[], 0, 0, out));
        }
    }
}

fn write_node(out: &mut thrift::Writer, node: &Node, is_root: bool) {
    if let Content::Leaf(leaf) = node.content {
        out.i32(1, leaf as i32);
    }
    if !is_root {
        out.i32(3, node.times as i32);
    }
    out.text(4, node.name);
    match &node.content {
        Content::Group { is_list, nodes } => {
            out.i32(5, nodes.len() as i32);
            if *is_list {
                out.i32(6, LIST);
                out.structure(10, |kind| kind.structure(3, |_| {}));
            }
        }
        Content::Leaf(Leaf::Text) => {
            out.i32(6, UTF8);
            out.structure(10, |kind| kind.structure(1, |_| {}));
        }
        Content::Leaf(_) => {}
    }
}

fn write_chunk(out: &mut thrift::Writer, place: &Place<'_>, chunk: &Chunk) {
    out.i64(2, chunk.offset);
    out.structure(3, |out| {
        out.i32(1, place.leaf as i32);
        out.i32s(2, &[PLAIN, RLE]);
        out.texts(3, &place.path);
        out.i32(4, SNAPPY);
        out.i64(5, chunk.n_entries);
        out.i64(6, chunk.plain_bytes);
        out.i64(7, chunk.bytes);
        out.i64(9, chunk.offset);
    });
}
