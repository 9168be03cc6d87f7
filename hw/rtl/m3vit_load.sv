// Loads a tile: its weights, and of each output bias and shifts (load_word of m3vit_engine_linear.h). The rows of a tile
// are one run of addresses, the tiles of a map follow one another, and so do the maps of an expert.
//
// The first half of a tile's words of results are made by the array's rows below SECOND, the others by those from there on.
// Of two ports each fills its half; one fills both.
// `start` asks for all of it; a word of weights from each port and one of parameters is taken at each `step` for which
// `ready` is up, while there is `more`. What is taken goes out a cycle later, with where it belongs.
module m3vit_load #(
    parameter int ADDRESS_BITS = 40,
    parameter int PORT_BITS = 128,
    parameter int W_BITS = 8,
    parameter int COLUMNS = 8,   // of the parameters: results of a step
    parameter int TILE_OUT = 16,
    parameter int BANKS = 1,
    parameter int DEPTH = 64,    // words of a bank, of one tile
    parameter int PORTS = 1,
    parameter int SECOND = 16,
    parameter int PARAMS = 8,    // rows of parameters of a tile's half
    localparam int ROW = DEPTH > 1 ? $clog2(DEPTH) : 1,
    localparam int PARAM = PARAMS > 1 ? $clog2(PARAMS) : 1
) (
    input  logic                          clk,
    input  logic                          reset,
    input  logic                          start,
    input  logic                          fresh,           // the first tile of a block,
    input  logic                          again,           // which is not the map's first: the weights once more
    input  logic                          second,          // map
    input  logic [                  15:0] inputs,          // these three some cycles before `start`
    input  logic [                  15:0] outputs,
    input  logic [                  15:0] half,            // of the outputs: those of the first half
    input  logic [      ADDRESS_BITS-1:0] weights,         // bytes: of the expert
    input  logic [      ADDRESS_BITS-1:0] params,
    output logic                          more,
    output logic                          ready,
    input  logic                          step,
    output logic [          TILE_OUT-1:0] write_output,
    output logic [             BANKS-1:0] write_bank,
    output logic [               ROW-1:0] write_at,
    output logic [   PORTS*PORT_BITS-1:0] write_data,
    output logic [         2*COLUMNS-1:0] write_params,    // columns of both halves
    output logic [             PARAM-1:0] params_at,
    output logic [        COLUMNS*64-1:0] params_data,
    output logic [             PORTS-1:0] arvalid,
    input  logic [             PORTS-1:0] arready,
    output logic [PORTS*ADDRESS_BITS-1:0] araddr,
    output logic [           PORTS*8-1:0] arlen,
    input  logic [             PORTS-1:0] rvalid,
    output logic [             PORTS-1:0] rready,
    input  logic [   PORTS*PORT_BITS-1:0] rdata,
    output logic                          params_arvalid,
    input  logic                          params_arready,
    output logic [      ADDRESS_BITS-1:0] params_araddr,
    output logic [                   7:0] params_arlen,
    input  logic                          params_rvalid,
    output logic                          params_rready,
    input  logic [         PORT_BITS-1:0] params_rdata
);
    localparam int SHIFT = $clog2(PORT_BITS / 8);
    localparam int LANES = PORT_BITS / W_BITS;
    localparam int ROWS = PORT_BITS / 64;  // of parameters in a word

    logic [ADDRESS_BITS-1:0] first_at, after, map_at, row_bytes;
    logic [ADDRESS_BITS-1:0] params_first, params_at_, params_map;
    logic [15:0] words, param_words;  // of a row; of the tile
    logic [PORTS-1:0] has, valid, pop;
    logic [PORTS*PORT_BITS-1:0] word;
    logic [PORTS*ADDRESS_BITS-1:0] next_at;
    logic params_asking, params_accepted, params_valid, params_pop;
    logic [PORT_BITS-1:0] params_word;
    logic [15:0] row, target, w, bank, column, param;  // target: the array's row
    logic param_half;
    logic [ROW-1:0] bank_at;
    logic [PARAM-1:0] param_at;
    logic rows_left, params_left, row_ends;

    assign words = inputs / 16'(LANES);
    assign row_bytes = ADDRESS_BITS'(words) << SHIFT;
    assign param_words = (outputs + 16'(ROWS - 1)) / 16'(ROWS);
    assign rows_left = row < (PORTS == 1 ? outputs : half);
    assign params_left = param < param_words;
    assign more = rows_left || params_left;
    assign row_ends = w + 1 == words;

    // Where the tile's weights and parameters begin.
    always_comb begin
        first_at = after;
        params_first = params_at_;
        if (fresh && again) begin
            first_at = map_at;
            params_first = params_map;
        end else if (fresh && !second) begin
            first_at = weights;
            params_first = params;
        end
    end
    always_ff @(posedge clk) begin
        if (start && fresh) begin
            map_at <= first_at;
            params_map <= params_first;
        end
        if (start) params_at_ <= params_first;
        else if (params_accepted) params_at_ <= params_at_ + (ADDRESS_BITS'(param_words) << SHIFT);
        if (reset) params_asking <= 0;
        else if (start) params_asking <= 1;
        else if (params_accepted) params_asking <= 0;
    end

    for (genvar p = 0; p < PORTS; p++) begin : port
        logic [ADDRESS_BITS-1:0] at;
        logic [15:0] rows, asked;
        logic asking, accepted;
        assign has[p] = rows_left && (p == 0 || half + row < outputs);
        assign next_at[p*ADDRESS_BITS+:ADDRESS_BITS] = at;
        assign asking = asked < rows;
        if (p == 0) begin : first
            always_ff @(posedge clk) if (start) rows <= PORTS == 1 ? outputs : half;
            always_ff @(posedge clk) if (start) at <= first_at; else if (accepted) at <= at + row_bytes;
        end else begin : second_
            logic [ADDRESS_BITS-1:0] half_bytes;
            always_ff @(posedge clk) begin
                half_bytes <= ADDRESS_BITS'(half * words) << SHIFT;
                if (start) rows <= outputs - half;
                if (start) at <= first_at + half_bytes;
                else if (accepted) at <= at + row_bytes;
            end
        end
        always_ff @(posedge clk)
            if (reset || start) asked <= reset ? 16'hffff : 0;
            else if (accepted) asked <= asked + 1;
        m3vit_axi_read #(
            .ADDRESS_BITS(ADDRESS_BITS),
            .DATA_BITS(PORT_BITS)
        ) read (
            .clk(clk),
            .reset(reset),
            .command_valid(asking),
            .command_ready(accepted),
            .command_first(at),
            .command_words(words),
            .word(word[p*PORT_BITS+:PORT_BITS]),
            .word_valid(valid[p]),
            .held(),
            .pop(pop[p]),
            .arvalid(arvalid[p]),
            .arready(arready[p]),
            .araddr(araddr[p*ADDRESS_BITS+:ADDRESS_BITS]),
            .arlen(arlen[p*8+:8]),
            .rvalid(rvalid[p]),
            .rready(rready[p]),
            .rdata(rdata[p*PORT_BITS+:PORT_BITS])
        );
    end
    assign after = next_at[(PORTS-1)*ADDRESS_BITS+:ADDRESS_BITS];  // of all rows: the next tile's
    m3vit_axi_read #(
        .ADDRESS_BITS(ADDRESS_BITS),
        .DATA_BITS(PORT_BITS)
    ) params_read (
        .clk(clk),
        .reset(reset),
        .command_valid(params_asking),
        .command_ready(params_accepted),
        .command_first(params_at_),
        .command_words(param_words),
        .word(params_word),
        .word_valid(params_valid),
        .held(),
        .pop(params_pop),
        .arvalid(params_arvalid),
        .arready(params_arready),
        .araddr(params_araddr),
        .arlen(params_arlen),
        .rvalid(params_rvalid),
        .rready(params_rready),
        .rdata(params_rdata)
    );

    // What has come.
    assign ready = (has & ~valid) == 0 && (!params_left || params_valid);
    assign pop = step ? has : 0;
    assign params_pop = step && params_left;
    always_ff @(posedge clk) begin
        if (start) begin
            row <= 0;
            target <= 0;
            param_half <= 0;
            w <= 0;
            bank <= 0;
            bank_at <= 0;
            param <= 0;
            column <= 0;
            param_at <= 0;
        end else if (step) begin
            if (rows_left) begin
                w <= row_ends ? 0 : w + 1;
                if (row_ends) begin
                    row <= row + 1;
                    target <= PORTS == 1 && row + 1 == half ? 16'(SECOND) : target + 1;
                end
                bank <= bank + 1 == 16'(BANKS) ? 0 : bank + 1;
                if (bank + 1 == 16'(BANKS)) bank_at <= row_ends ? 0 : bank_at + 1;
            end
            if (params_left) begin
                param <= param + 1;
                column <= column + 16'(ROWS) == 16'(COLUMNS) ? 0 : column + 16'(ROWS);
                if (column + 16'(ROWS) == 16'(COLUMNS)) begin
                    param_at <= (param + 1) * 16'(ROWS) == half ? 0 : param_at + 1;
                    if ((param + 1) * 16'(ROWS) == half) param_half <= 1;
                end
            end
        end
        for (int o = 0; o < TILE_OUT; o++)
            write_output[o] <= PORTS == 1 || o < SECOND ? pop[0] && target == 16'(o)
                                                        : pop[PORTS-1] && target + 16'(SECOND) == 16'(o);
        for (int b = 0; b < BANKS; b++) write_bank[b] <= bank == 16'(b);
        write_data <= word;
        write_at <= bank_at;
        for (int c = 0; c < COLUMNS; c++) begin
            for (int h = 0; h < 2; h++)
                write_params[h*COLUMNS+c] <= params_pop && param_half == (h == 1) && 16'(c) >= column
                                          && 16'(c) < column + 16'(ROWS);
            params_data[c*64+:64] <= params_word[c%ROWS*64+:64];
        end
        params_at <= param_at;
    end
endmodule
