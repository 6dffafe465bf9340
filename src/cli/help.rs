//! The form of `--help`, and the examples in it. `help2man` makes the manual page of it, which
//! wants "Usage:", "Options:" and "Examples:" at the start of a line, and a `$` before commands.

pub(super) const ABOUT: &str = "\
Streams a CRIU checkpoint image between CRIU and pipes, without touching the disk.

Start `criu-image-streamer` first, wait for its line `socket-init`, then run `criu dump --stream`
or `criu restore --stream` with the same --images-dir.";

pub(super) const ALL_TEMPLATE: &str = "\
{about}

Usage: {usage}

Options:
{unified}

Subcommands:
{subcommands}

{after-help}";

/// What is shown when nothing was typed: it fits on a screen.
pub(super) const USAGE: &str = "\
Usage: {usage}

Subcommands:
{subcommands}

Try criu-image-streamer --help for the options and for examples.";

pub(super) const TEMPLATE: &str = "\
{about}

Usage: {usage}

Options:
{unified}

{after-help}";

pub(super) const EXAMPLES: &str = "\
Examples:

Checkpoint process 1234 to a compressed file; run `criu dump` when `socket-init` has come:

  $ criu-image-streamer --images-dir images capture | lz4 >app.lz4
  $ criu dump --stream --images-dir images --tree 1234

Upload it as four objects, and fail if one of the uploads does:

  $ criu-image-streamer -D images --num-shards 4 --shard-cmd 'lz4 | aws s3 cp - s3://app/{}.lz4' capture

Restore from a compressed file; run `criu restore` when `socket-init` has come:

  $ lz4 -d <app.lz4 | criu-image-streamer --images-dir images serve
  $ criu restore --stream --images-dir images

Download it from four objects, and serve nothing if one of the downloads fails:

  $ criu-image-streamer -D images --num-shards 4 --shard-cmd 'aws s3 cp s3://app/{}.lz4 - | lz4 -d' serve

Write the image's files to a directory, and restore from there without the streamer:

  $ lz4 -d <app.lz4 | criu-image-streamer --images-dir images extract
  $ criu restore --images-dir images

Look into a stored image, and find out whether it is whole:

  $ lz4 -d <app.lz4 | criu-image-streamer list";
