//! The form of `--help`, and the examples in it. `help2man` makes the manual page of it, which
//! wants "Usage:", "Options:" and "Examples:" at the start of a line, and a `$` before commands.

pub(super) const ABOUT: &str = "\
Streams a CRIU checkpoint image between CRIU and pipes, without touching the disk.

It starts `criu dump --stream` or `criu restore --stream` when CRIU can connect, and waits for it.
Or start it first, wait for its line `socket-init`, and then run CRIU with the same --images-dir.";

pub(super) const ALL_TEMPLATE: &str = "\
{about}

Usage: {usage}

Options:
{unified}

Subcommands:
{subcommands}

{after-help}";

pub(super) const TEMPLATE: &str = "\
{about}

Usage: {usage}

Options:
{unified}

{after-help}";

pub(super) const EXAMPLES: &str = "\
Examples:

Checkpoint process 1234 to a compressed file, and restore it:

  $ criu-image-streamer -D images --shard-cmd 'lz4 >app.lz4' capture -- criu dump --stream -D images -t 1234
  $ criu-image-streamer -D images --shard-cmd 'lz4 -d <app.lz4' serve -- criu restore --stream -D images -d

Let CRIU start the streamer, and kill the process only when the upload has succeeded:

  $ echo '--shard-cmd lz4 >app.lz4' >/etc/criu-image-streamer/streamer-capture.options
  $ criu dump --stream --action-script criu-image-streamer --images-dir images --tree 1234

With the directory that it works in:

  $ criu-image-streamer -D images --ext-file-cmd 'fs.tar:tar -C /srv/app -cf - .' --shard-cmd 'lz4 >app.lz4' capture -- criu dump --stream -D images -t 1234
  $ criu-image-streamer -D images --ext-file-cmd 'fs.tar:tar -C /srv/app -xf -' --shard-cmd 'lz4 -d <app.lz4' serve -- criu restore --stream -D images -d

As four objects, which fails if one of the uploads or downloads does:

  $ criu-image-streamer -D images --num-shards 4 --shard-cmd 'lz4 | aws s3 cp - s3://app/{}.lz4' capture -- criu dump --stream -D images -t 1234
  $ criu-image-streamer -D images --num-shards 4 --shard-cmd 'aws s3 cp s3://app/{}.lz4 - | lz4 -d' serve -- criu restore --stream -D images -d

Write the image's files to a directory, and restore from there without the streamer:

  $ lz4 -d <app.lz4 | criu-image-streamer -D images extract
  $ criu restore -D images

Look into a stored image, and find out whether it is whole:

  $ lz4 -d <app.lz4 | criu-image-streamer list";
