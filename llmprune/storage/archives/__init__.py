r"""Archives: entropy-coded storage of a checkpoint folder in one file, lossless, for when it is not in use.

Byte specification. An archive is a line, then records; numbers are little-endian.

    "llmprune archive 1\n"
    record: uint32 length, at most 65,536 | JSON of that length, UTF-8 | the parts that a block names
    ...

| record | fields | followed by |
|---|---|---|
| `contents` | `files`, `bytes` of all of them, `dense_bytes` of the checkpoint's tensors when dense | its files |
| `file` | `name`, a relative path with /; `bytes` | its blocks, in order |
| `block` | `bytes`, at most 16 MiB; `word`, `floating`, `mask`, `signs`; `parts`, `sha256` of the bytes | its parts |
| `end` | `sha256` of everything before this record | nothing |

* A block is read as words of `word` bytes (1, 2, 4 or 8): those of one tensor, or bytes. Every part is one zstd frame;
  `parts` has their sizes.
* With `mask`, the first part has a bit for each word: bit j % 8 (counted from the lowest) of byte j // 8 is set if word
  j is stored. The others are zeros; with `signs`, the next part has a bit for each of these: set for -0.0.
* Then come the planes of the stored words: the lowest byte of every word, then the next byte of every word, to the
  highest. Words of `floating` tensors are first rotated left by one bit, so that the sign comes last and the highest
  byte of a bfloat16 or float32 is its exponent. Exponents repeat themselves; the other bytes are nearly random.

Refused when read, before anything is made of it: a record that is too long, is not JSON, lacks a field, has another, or
one of a wrong type; names that lead out of the folder or come twice; sizes that do not add up; a frame that holds more
or fewer bytes than it must; bytes with another digest; an archive that ends early, or does not end.
"""
