# The first process of each Linux guest of the tests sources this first. It installs the programs of the shell, mounts
# the kernel's file systems, and loads the modules.
PATH=/bin:/sbin:/usr/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
# There is no list of dependencies: each module is tried until those that it needs are loaded.
for pass in 1 2 3 4 5; do
    for module in /modules/*.ko; do insmod "$module" 2>/dev/null && rm "$module"; done
done
