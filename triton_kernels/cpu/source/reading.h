// A sum that reads memory as fast as it can be read, for the rate that products are compared with.
#pragma once

struct Stream {
  const float* from;
  int64_t n;
  float sums[256];  // of threads; more than that share
};

static void stream_share(void* data) {
  Stream& s = *(Stream*)data;
  int me;
  const int parts = team(&me);
  const int64_t from = s.n / 64 * me / parts * 64, to = s.n / 64 * (me + 1) / parts * 64;
  s.sums[me % 256] = avx2::sum(s.from + from, to - from);
}
