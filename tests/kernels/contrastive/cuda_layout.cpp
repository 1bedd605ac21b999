// Maps of threads, registers and buffers, each against what it must be.
#include "contrastive/cuda_lanes.h"
#include "contrastive/tensor_core.h"
#include "contrastive/warpgroup.h"
#include "expect.h"

#include <random>
#include <set>
#include <utility>

using namespace carillon;
using namespace carillon::contrastive;

namespace {

void accumulators_cover_a_tile_once() {
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < 128; ++thread) {
    for (int reg = 0; reg < kRegisters; ++reg) {
      seen.insert({hopper::row_of(thread, reg), hopper::column_of(thread, reg)});
    }
  }
  EXPECT_EQUAL(seen.size(), size_t{64 * 256});
  EXPECT_EQUAL(seen.begin()->first, 0);
  EXPECT_EQUAL(seen.rbegin()->first, 63);
  EXPECT_EQUAL(seen.rbegin()->second, 255);
}

// A box copied with its swizzle is read back by descriptors, at every step of 16 dims and for the
// second warpgroup's rows.
void descriptors_find_what_was_copied() {
  test::SharedBytes shared{std::vector<uint8_t>(4096 + 128 * 128)};
  std::vector<uint16_t> features(128 * 64);
  for (size_t k = 0; k < features.size(); ++k) features[k] = static_cast<uint16_t>(0x3f80 + k);
  shared.copy_box(4096, features, 128, 64, 0, 0, 64, 128);
  for (int group = 0; group < 2; ++group) {
    for (int step = 0; step < 4; ++step) {
      const uint64_t descriptor =
          hopper::operand_descriptor(4096 + group * 64 * 128 + step * 32);
      for (int i = 0; i < 64; ++i) {
        for (int k = 0; k < 16; ++k) {
          const float wanted = test::from_bfloat16(features[(group * 64 + i) * 64 + step * 16 + k]);
          EXPECT_EQUAL(shared.operand(descriptor, i, k), wanted);
        }
      }
    }
  }
}

// Fields as the PTX ISA lists them.
void descriptor_fields_stand_where_they_must() {
  const uint64_t descriptor = hopper::operand_descriptor(0x2c420);
  EXPECT_EQUAL(descriptor & 0x3fff, uint64_t{0x2c42});
  EXPECT_EQUAL(descriptor >> 16 & 0x3fff, uint64_t{1});
  EXPECT_EQUAL(descriptor >> 32 & 0x3fff, uint64_t{64});
  EXPECT_EQUAL(descriptor >> 49 & 7, uint64_t{0});
  EXPECT_EQUAL(descriptor >> 62, uint64_t{1});
}

// A barrier in shared memory: a wait for a parity passes once the phase of that parity is complete.
struct Phases {
  int arrivals;
  int here = 0;
  uint32_t phase = 0;
  void arrive() {
    if (++here == arrivals) {
      here = 0;
      phase ^= 1;
    }
  }
  bool passes(uint32_t parity) const { return phase != parity; }
};

// A producer and two consumers in any order of steps: nothing is read before it is written,
// nothing overwritten before both have read it, and all come to the end.
void the_ring_hands_every_buffer_over(int num_stages, unsigned seed) {
  constexpr int steps = 37;
  std::vector<Phases> full(num_stages, {1}), empty(num_stages, {2});
  std::vector<int> content(num_stages, -1), num_reads(num_stages, 2);
  hopper::RingPosition positions[3];
  int done[3] = {0, 0, 0};
  std::minstd_rand random(seed);
  for (int turn = 0; turn < 20000; ++turn) {
    const int who = static_cast<int>(random() % 3);
    hopper::RingPosition& at = positions[who];
    if (done[who] == steps) continue;
    if (who == 0) {
      if (!empty[at.stage].passes(at.phase ^ 1)) continue;
      EXPECT_EQUAL(num_reads[at.stage], 2);
      content[at.stage] = done[0];
      num_reads[at.stage] = 0;
      full[at.stage].arrive();
    } else {
      if (!full[at.stage].passes(at.phase)) continue;
      EXPECT_EQUAL(content[at.stage], done[who]);
      ++num_reads[at.stage];
      empty[at.stage].arrive();
    }
    ++done[who];
    at.advance(num_stages);
  }
  for (const int count : done) EXPECT_EQUAL(count, steps);
}

// Column sums of a tile through exchanges and shared memory, and a quad's words transposed.
void lanes_combine_columns_and_transpose() {
  test::GroupMemory memory;
  memory.values.resize(kSharedValues);
  std::vector<float> wanted(kTileColumns, 0.0f), sums(kTileColumns);
  const auto value = [](int row, int column) { return static_cast<float>(row * 5 + column % 17); };
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < kTileColumns; ++j) wanted[j] += value(i, j);
  }
  memory.scheduler.run([&](int thread) {
    test::HostThreads<uint16_t> threads{thread, memory};
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float columns[kChunkValues];
      for (int v = 0; v < kChunkValues; ++v) {
        const int r = chunk_register(chunk, v);
        columns[v] = value(hopper::row_of(thread, r), hopper::column_of(thread, r)) +
                     value(hopper::row_of(thread, r + 2), hopper::column_of(thread, r + 2));
      }
      fold_chunk(threads, columns, Add{});
      put_chunk(threads, chunk, columns);
    }
    threads.wait();
    for (int which = 0; which < 2; ++which) {
      sums[thread * 2 + which] = gather(threads, which, Add{});
    }
    uint32_t words[4];
    for (uint32_t i = 0; i < 4; ++i) words[i] = static_cast<uint32_t>(thread) * 4 + i;
    transpose_quad(threads, words);
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t from = static_cast<uint32_t>(thread / 4) * 4 + i;
      EXPECT_EQUAL(words[i], from * 4 + static_cast<uint32_t>(thread) % 4);
    }
    EXPECT_EQUAL(threads.any(thread == 77), true);
    EXPECT_EQUAL(threads.any(false), false);
  });
  for (int j = 0; j < kTileColumns; ++j) EXPECT_EQUAL(sums[j], wanted[j]);
}

}  // namespace

int main() {
  accumulators_cover_a_tile_once();
  descriptors_find_what_was_copied();
  descriptor_fields_stand_where_they_must();
  for (unsigned seed = 1; seed <= 20; ++seed) {
    for (const int num_stages : {1, 2, 3, 4}) the_ring_hands_every_buffer_over(num_stages, seed);
  }
  lanes_combine_columns_and_transpose();
  return test::report();
}
