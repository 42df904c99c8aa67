// Threads are those of the OpenMP library that the process has loaded already, which is torch's: two pools would compete
// for the cores. Its entry points are declared here and not compiled in, so that any compiler will do and no second
// library is linked.
#pragma once

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

// Runs body(data) in several threads; fewer than asked for, or one, if the library has no more.
static void in_threads(void (*body)(void*), void* data, int threads) {
  if (threads > 1 && GOMP_parallel) GOMP_parallel(body, data, threads, 0);
  else body(data);
}
static int team(int* me) {
  *me = omp_get_thread_num ? omp_get_thread_num() : 0;
  return omp_get_num_threads ? omp_get_num_threads() : 1;
}
