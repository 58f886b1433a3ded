/*
 * The least that an export with plain reads and writes takes: copy files with a few threads, and nothing else.
 *
 * cc -O2 -pthread -o floor floor.c && ./floor THREADS WRITE_BYTES FILE... DIRECTORY
 *
 * Each file gets its space with fallocate, as the package reserves it. Then each thread reads the next 512 KiB into its
 * own buffer and writes them in pieces of WRITE_BYTES. There are no checksums, and no tensors.
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BAND_BYTES = 512 << 10, MOST_THREADS = 64 };

static int source, target;
static long write_bytes, num_bytes, next_byte;

static void *copy_bands(void *unused)
{
    char *band = mmap(NULL, BAND_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (band == MAP_FAILED)
        err(1, "mmap");
    for (;;) {
        long start = __atomic_fetch_add(&next_byte, BAND_BYTES, __ATOMIC_RELAXED), done, step;
        long length = num_bytes - start < BAND_BYTES ? num_bytes - start : BAND_BYTES;
        if (start >= num_bytes)
            break;
        for (done = 0; done < length; done += step)
            if ((step = pread(source, band + done, length - done, start + done)) <= 0)
                err(1, "pread");
        for (done = 0; done < length; done += step) {
            long piece = length - done < write_bytes ? length - done : write_bytes;
            if ((step = pwrite(target, band + done, piece, start + done)) <= 0)
                err(1, "pwrite");
        }
    }
    munmap(band, BAND_BYTES);
    return unused;
}

static void copy_file(const char *path, const char *directory, int num_threads)
{
    pthread_t threads[MOST_THREADS];
    const char *slash = strrchr(path, '/');
    struct stat status;
    char *copy;
    if (asprintf(&copy, "%s/%s", directory, slash ? slash + 1 : path) < 0)
        err(1, "asprintf");
    if ((source = open(path, O_RDONLY)) < 0 || fstat(source, &status))
        err(1, "%s", path);
    num_bytes = status.st_size;
    next_byte = 0;
    if ((target = open(copy, O_RDWR | O_CREAT | O_EXCL, 0666)) < 0 || ftruncate(target, num_bytes))
        err(1, "%s", copy);
    if (num_bytes && fallocate(target, 0, 0, num_bytes))
        warn("%s: no space was reserved", copy);
    for (int i = 0; i < num_threads; i++)
        if (pthread_create(&threads[i], NULL, copy_bands, NULL))
            errx(1, "cannot start a thread");
    for (int i = 0; i < num_threads; i++)
        pthread_join(threads[i], NULL);
    close(source);
    close(target);
    free(copy);
}

int main(int count, char **words)
{
    int num_threads = count > 4 ? atoi(words[1]) : 0;
    write_bytes = count > 4 ? atol(words[2]) : 0;
    if (num_threads < 1 || num_threads > MOST_THREADS || write_bytes < 1)
        errx(2, "usage: %s THREADS WRITE_BYTES FILE... DIRECTORY", words[0]);
    if (mkdir(words[count - 1], 0777))
        err(1, "%s", words[count - 1]);
    for (int i = 3; i < count - 1; i++)
        copy_file(words[i], words[count - 1], num_threads);
    return 0;
}
