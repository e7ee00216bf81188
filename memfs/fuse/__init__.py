r"""The kernel's side of memfs: /dev/fuse, the mount, and two servers of FUSE requests behind one descriptor.

    kernel  <- /dev/fuse ->  channel.py  -- handlers by subject: names.py, files.py, xattrs.py, ioctl.py
                                  \------- pyfuse3: operations.py

Which of the two answers is one table, opcodes.py. pyfuse3 knows neither FALLOCATE nor LSEEK nor IOCTL, each of its
answers costs two event-loop iterations more, and whatever fills its 99 tasks or its socketpair stops the mount for
everybody. So it settles with the kernel what both can do (INIT, amended by init.py), and our own handlers answer all
else.

The ABI is in abi.py, what stat(2) tells as bytes in reply.py; mount.py makes the mount, passthrough.py registers
backing files.
"""
